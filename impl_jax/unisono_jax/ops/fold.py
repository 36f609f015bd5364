"""The recurrent form of every op: a scan of its `step`. Parallel forms do not use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def fold(
    step: Callable[..., tuple[jax.Array, Any]],
    inputs: Sequence[jax.Array],
    initial_state: Any,
    reset: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """inputs [B, T, …]: step(*inputs at t, state, reset at t, valid at t) → outputs [B, T, …], final state.

    `initial_state` has the dtypes that `step` returns.
    """

    def token(state: Any, at_t: tuple) -> tuple[Any, jax.Array]:
        *x, cut, read = at_t
        o, state = step(*x, state, cut, read)
        return state, o

    time_major = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (*inputs, reset, valid))
    state, o = lax.scan(token, initial_state, time_major)
    return jnp.swapaxes(o, 0, 1), state
