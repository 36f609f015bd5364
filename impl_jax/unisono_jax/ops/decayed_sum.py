"""CRAM's fixed compression scheme: ξ_t = λ ξ_{t−1} + (1−λ) σ(x_t), ξ_{−1} = 0 (Muraleedharan, eqs 2–5, with λ = ½).

ξ_t includes x_t: it is the paper's Ξ_{t+1}, which predicts x_{t+1}.

Shapes: x [B, T, D] of any float dtype, state [B, D], reset and valid [B, T] bool or None. Each form returns (ξ, final state), in
float32, or in float64 where x or the state is.
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
    x: jax.Array, decay: float, state: jax.Array, reset: jax.Array | None = None, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token: x [B, D], reset and valid [B]."""
    dtype = wide(x, state)
    x, state = x.astype(dtype), state.astype(dtype)
    if reset is not None:
        state = jnp.where(reset[:, None], 0, state)
    if valid is not None:
        x = jnp.where(valid[:, None], x, 0)  # what is not read may be NaN, and 0 · NaN would reach the gradient
    u = sigmoid(x)
    # eq 5; as a correction above ½, where rounding λ to float32 would move the fixed point by up to u / (1 − λ)
    xi = state + (1 - decay) * (u - state) if decay > 0.5 else decay * state + (1 - decay) * u
    if valid is not None:
        xi = jnp.where(valid[:, None], xi, state)
    return xi, xi


@shaped
def recurrent(
    x: jax.Array, decay: float, initial_state: jax.Array, reset: jax.Array | None = None, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""

    def fold(state: jax.Array, token: tuple) -> tuple[jax.Array, jax.Array]:
        xi, state = step(token[0], decay, state, token[1], token[2])
        return state, xi

    time_major = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, reset, valid))
    state, xi = lax.scan(fold, initial_state.astype(wide(x, initial_state)), time_major)
    return jnp.swapaxes(xi, 0, 1), state


@shaped
def parallel(
    x: jax.Array,
    decay: float,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The closed form (eq 2) inside chunks of C tokens, as one matmul, with a carry between them.

    ξ_t = Σ_{j≤t} (1−λ) λ^{n_t−n_j} σ(x_j) + λ^{n_t} ξ_{−1}, where n counts the valid tokens read; a reset cuts both terms.
    `decay` is a Python number, not a traced one.
    """
    check_implementation(implementation)
    dtype = wide(x, initial_state)
    x = x.astype(dtype)
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    u = (1 - decay) * sigmoid(x)
    if valid is not None:
        u = jnp.where(valid[..., None], u, 0)
    count = None if valid is None else valid.astype(jnp.int32)
    start = restarted(reset, initial_state.astype(dtype))
    xi = chunked.prefix(u, decay, start, chunk_size, count, reset)
    return xi, xi[:, -1]
