"""Sequences cut in chunks of C tokens, and the states between the chunks. All work inside chunks is done for all of them at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from unisono_spec.contract import InputError

from unisono_jax.ops.elementwise import masked


def chunk_length(chunk_size: int, length: int) -> int:
    """Tokens in a chunk; InputError where there are none at all."""
    if not length:
        raise InputError("T is 0; give at least one token")
    return min(chunk_size, length)


def chunks(a: jax.Array, size: int) -> jax.Array:
    """[B, T, …] → [B, N, C, …], zeros (false) after the end."""
    batch, length, *rest = a.shape
    number = -(-length // size)
    behind = number * size - length
    if behind:
        a = jnp.pad(a, ((0, 0), (0, behind), *((0, 0) for _ in rest)))
    return a.reshape(batch, number, size, *rest)


def joined(a: jax.Array, length: int) -> jax.Array:
    """[B, N, C, …] → [B, T, …]."""
    return a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])[:, :length]


def shared(reset: jax.Array | None, size: int) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """For chunks of one size → which key [.., j] each query [t, ..] may read [B or 1, N or 1, C, C]; which tokens [B, N, C]
    may read the state before their chunk; which are still held after it; which chunks [B, N] forget that state."""
    lower = jnp.tril(jnp.ones((size, size), bool))[None, None]
    if reset is None:
        return lower, None, None, None
    segment = jnp.cumsum(chunks(reset, size), axis=2, dtype=jnp.int32)
    same = segment[..., :, None] == segment[..., None, :]
    return lower & same, segment == 0, segment == segment[..., -1:], segment[..., -1] > 0


def carried(
    own: jax.Array, initial: jax.Array, cut: jax.Array | None = None, decay: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """y_n = decay_n y_{n−1} + own_n, with y_{n−1} = 0 where `cut`: y before each chunk [B, N, …], and after the last [B, …].

    own [B, N, …], initial [B, …], cut [B, N] or None, decay [B, N, …] or None (1).
    """

    def chunk(y: jax.Array, at_n: tuple) -> tuple[jax.Array, jax.Array]:
        added, forget, factor = at_n
        kept = y if factor is None else factor * y
        if forget is not None:
            (kept,) = masked(~forget, kept)
        return kept + added, y

    last, before = lax.scan(chunk, initial, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (own, cut, decay)))
    return jnp.swapaxes(before, 0, 1), last
