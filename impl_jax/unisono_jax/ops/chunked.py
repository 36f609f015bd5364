"""What both of CRAM's sums are in parallel: y_t = λ^{n_t} y_{t−1} + u_t, with y_{t−1} = 0 where a sequence starts anew.

Inside a chunk of C tokens it is one matmul by the C × C matrix of λ^{Σn}. The ends of the chunks obey the same recurrence, so
they are chunked in turn: no loop over time, ⌈log_C T⌉ levels, work and memory linear in T. Powers come from differences of
integers, so nothing overflows and no running sum is subtracted from another.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unisono_jax.ops.carry import chunk_length
from unisono_jax.ops.elementwise import dot_precision

# Levels above the first: fewer of them matter more than the width of their small matrices.
UPPER_CHUNK = 64


def prefix(
    u: jax.Array, decay: float, initial: jax.Array, chunk_size: int, count: jax.Array | None = None, reset: jax.Array | None = None
) -> jax.Array:
    """u [B, T, D], decay λ in (0, 1], initial [B, D] → y [B, T, D], all of one float dtype.

    count [B, T] int32: n_t, how often λ acts at t; None is once. reset [B, T] bool: where true, y_{t−1} counts as 0.
    """
    batch, length, width = u.shape
    size = chunk_length(chunk_size, length)
    n_chunks = length // size
    whole = n_chunks * size

    def chunks(a: jax.Array) -> jax.Array:
        return a[:, :whole].reshape(batch, n_chunks, size, *a.shape[2:])

    counts = resets = None
    if count is None:
        weight, kept = _toeplitz(size, decay, u.dtype)  # [C, C], [C]
        upper_decay = decay**size
    else:
        powers = jnp.cumsum(chunks(count), axis=2, dtype=jnp.int32)  # [B, N, C]
        weight, kept = _counted(powers, decay, u.dtype)  # [B, N, C, C], [B, N, C]
        counts, upper_decay = powers[..., -1], decay
    if reset is not None:
        segments = jnp.cumsum(chunks(reset), axis=2, dtype=jnp.int32)  # [B, N, C]
        weight = jnp.where(segments[..., :, None] == segments[..., None, :], weight, 0)  # query by key
        kept = jnp.where(segments == 0, kept, 0)
        resets = segments[..., -1] > 0
    local = jnp.matmul(weight, chunks(u), precision=dot_precision(u.dtype))  # [B, N, C, D]
    before = initial[:, None]  # [B, N, D]
    if n_chunks > 1:
        ends = prefix(local[:, :, -1], upper_decay, initial, UPPER_CHUNK, counts, resets)  # [B, N, D]
        before = jnp.concatenate([before, ends[:, :-1]], 1)
    y = (local + kept[..., None] * before[:, :, None]).reshape(batch, whole, width)
    if whole == length:
        return y
    rest = (None if a is None else a[:, whole:] for a in (count, reset))
    return jnp.concatenate([y, prefix(u[:, whole:], decay, y[:, -1], chunk_size, *rest)], 1)


def _toeplitz(size: int, decay: float, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """λ^{t−j} for j ≤ t, and λ^{t+1} for what came before the chunk."""
    t = np.arange(size)
    weight = np.tril(float(decay) ** np.maximum(t[:, None] - t, 0))
    return jnp.asarray(weight, dtype), jnp.asarray(float(decay) ** (t + 1), dtype)


def _counted(powers: jax.Array, decay: float, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """The same where λ does not act once a token: differences are masked before the power, which could overflow above the diagonal."""
    reads = jnp.tril(jnp.ones((powers.shape[-1],) * 2, bool))
    difference = jnp.where(reads, powers[..., :, None] - powers[..., None, :], 0)  # query by key
    return jnp.where(reads, _power(decay, difference, dtype), 0), _power(decay, powers, dtype)


def _power(decay: float, exponent: jax.Array, dtype: np.dtype) -> jax.Array:
    """λ^n for n ≥ 0. The error of the exponent, |n log₂ λ| u, is never seen: λ^n is smaller by then."""
    return jnp.exp2(exponent.astype(dtype) * np.asarray(np.log2(decay), dtype))
