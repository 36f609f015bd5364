"""CRAM's adaptive compression scheme: ξ_t = ξ_{t−1} + s_t σ(x_t), ξ_{−1} = 0 (Muraleedharan, eqs 8–10).

Weights carry the source's index, not the output's (eq 7 as printed admits no recurrence). `exclusive` gives the printed
sums, without token t.

Shapes: x [B, T, D] and s [B, T] of any float dtype, state [B, D], reset and valid [B, T] bool or None. Each form returns
(ξ, final state), in float32, or in float64 where one of x, s and the state is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from unisono_spec.contract.shapes import shaped

from unisono_jax.ops import chunked
from unisono_jax.ops.elementwise import restarted, sigmoid, wide
from unisono_jax.registry import check_implementation


@shaped
def step(
    x: jax.Array,
    s: jax.Array,
    state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    exclusive: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One token: x [B, D], s, reset and valid [B]."""
    dtype = wide(x, s, state)
    x, s, state = x.astype(dtype), s.astype(dtype), state.astype(dtype)
    if reset is not None:
        state = jnp.where(reset[:, None], 0, state)
    if valid is not None:  # what is not read may be NaN, and 0 · NaN would reach the gradient
        x, s = jnp.where(valid[:, None], x, 0), jnp.where(valid, s, 0)
    xi = state + s[:, None] * sigmoid(x)  # eq 10
    return (state if exclusive else xi), xi


@shaped
def recurrent(
    x: jax.Array,
    s: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    exclusive: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""

    def fold(state: jax.Array, token: tuple) -> tuple[jax.Array, jax.Array]:
        xi, state = step(token[0], token[1], state, token[2], token[3], exclusive)
        return state, xi

    time_major = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, s, reset, valid))
    state, xi = lax.scan(fold, initial_state.astype(wide(x, s, initial_state)), time_major)
    return jnp.swapaxes(xi, 0, 1), state


@shaped
def parallel(
    x: jax.Array,
    s: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    exclusive: bool = False,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A segmented sum inside chunks of C tokens, as one matmul, with a carry between them."""
    check_implementation(implementation)
    dtype = wide(x, s, initial_state)
    x, s, initial_state = x.astype(dtype), s.astype(dtype), restarted(reset, initial_state.astype(dtype))
    if valid is not None:
        x, s = jnp.where(valid[..., None], x, 0), jnp.where(valid, s, 0)
    xi = chunked.prefix(s[..., None] * sigmoid(x), 1.0, initial_state, chunk_size, None, reset)
    final = xi[:, -1]
    if exclusive:
        xi = jnp.concatenate([initial_state[:, None], xi[:, :-1]], 1)
        if reset is not None:
            xi = jnp.where(reset[..., None], 0, xi)
    return xi, final
