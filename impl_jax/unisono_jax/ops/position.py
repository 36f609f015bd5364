"""The absolute position of each token: how many valid tokens its sequence held before it. int32, counted from the state.

Shapes: initial_state [B] int32, reset and valid [B, T] bool or None. Each form returns (position, final state).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def step(state: jax.Array, reset: jax.Array | None = None, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """One token: reset and valid [B] → position [B], count after it [B]."""
    position = state if reset is None else jnp.where(reset, 0, state)
    return position, position + (jnp.int32(1) if valid is None else valid.astype(jnp.int32))


def parallel(
    initial_state: jax.Array, length: int, reset: jax.Array | None = None, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """[B, T]: valid tokens before each one, less those before its sequence began (integers, so the difference is exact)."""
    shape = (initial_state.shape[0], length)
    if valid is None:
        before = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
        last = jnp.int32(1)
    else:
        count = valid.astype(jnp.int32)
        before = jnp.cumsum(count, axis=1, dtype=jnp.int32) - count  # [B, T]
        last = count[:, -1]
    position = initial_state[:, None] + before
    if reset is not None:
        start = lax.cummax(jnp.where(reset, before, -1), axis=1)  # [B, T], −1 before the first reset
        position = jnp.where(start < 0, position, before - start)
    return position, position[:, -1] + last


def furthest(initial_state: Any, length: int, reset: Any = None, valid: Any = None) -> int:
    """How many tokens the longest sequence holds at any valid token. In NumPy, of arrays whose values are known."""
    start = np.asarray(initial_state)[:, None]
    read = np.ones((len(start), length), bool) if valid is None else np.asarray(valid)
    before = np.cumsum(read, 1) - read
    if reset is None:
        held = start + before
    else:
        begin = np.maximum.accumulate(np.where(np.asarray(reset), before, -1), 1)
        held = np.where(begin < 0, start + before, before - begin)
    return int(np.where(read, held, -1).max(initial=-1)) + 1
