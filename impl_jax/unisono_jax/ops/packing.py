"""Ragged batches: the valid tokens of each row moved to its front, so that what lies d tokens back lies d places back."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
    """count [B]: the valid tokens of each row. order [B, T]: the token at each place; place [B, T]: its inverse; None: as it is."""

    count: jax.Array
    order: jax.Array | None = None
    place: jax.Array | None = None

    def pack(self, a: jax.Array) -> jax.Array:
        """[B, T, …] → [B, T, …], the valid tokens first."""
        return a if self.order is None else take(a, self.order)

    def unpack(self, a: jax.Array) -> jax.Array:
        """Back."""
        return a if self.place is None else take(a, self.place)


def packing(valid: jax.Array | None, batch: int, length: int) -> Packing:
    if valid is None:
        return Packing(jnp.full(batch, length, jnp.int32))
    read = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    count = read[:, -1]
    place = jnp.where(valid, read - 1, count[:, None] + jnp.arange(length, dtype=jnp.int32) - read)
    return Packing(count, jnp.argsort(place, axis=1), place)


def take(a: jax.Array, index: jax.Array) -> jax.Array:
    """a [B, T, …], index [B, n], in bounds and distinct in each row → [B, n, …]."""
    rows = jnp.arange(a.shape[0])[:, None]
    return a.at[rows, index].get(mode="promise_in_bounds", unique_indices=True)


def segments(reset: jax.Array | None, batch: int, length: int) -> jax.Array:
    """How many resets came before or at each token [B, T]: 0 continues the initial state."""
    return jnp.zeros((batch, length), jnp.int32) if reset is None else jnp.cumsum(reset, axis=1, dtype=jnp.int32)
