"""The selective scan of Mamba, S6 (Gu & Dao 2024, eq 2a–2b and algorithm 2, with B discretised as Δ B):

h_t = exp(Δ_t A) ∘ h_{t−1} + Δ_t B_t u_t,  y_t = C_t h_t + D ∘ u_t.

Shapes, with D channels of N states: u, dt (Δ > 0) [B, T, D], A (< 0) [D, N], B, C [B, T, N], D [D], state h [B, D, N], reset and
valid [B, T] bool or None. Each form returns (y [B, T, D], final state), float32 or wider. y is 0 where a token is not valid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from unisono_jax.kernels import resolve
from unisono_jax.ops.carry import chunks, joined
from unisono_jax.ops.elementwise import dot, masked, widened
from unisono_jax.ops.fold import fold


def step(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token: u, dt [B, D], B, C [B, N], reset and valid [B]."""
    u, dt, B, C, A, D, state = widened(*masked(valid, u, dt, B, C), A, D, state)  # Δ = 0 keeps h as it is
    if reset is not None:
        (state,) = masked(~reset, state)
    h = jnp.exp(dt[..., None] * A) * state + (dt * u)[..., None] * B[:, None]
    return dot("bdn,bn->bd", h, C) + D * u, h


def recurrent(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The definition: a fold of `step`."""
    u, dt, A, B, C, D, state = widened(u, dt, A, B, C, D, initial_state)
    return fold(lambda u, dt, B, C, *rest: step(u, dt, A, B, C, D, *rest), (u, dt, B, C), state, reset, valid)


def parallel(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """An inclusive scan over the maps h → a h + b by doubling (Hillis & Steele 1986) inside chunks, and a carry between them.

    A reset is a map with a = 0, a token that is not valid one with a = 1 and b = 0. Chunks follow one another, and are computed
    again for the gradient: states [D, N] of one chunk's tokens are all that is ever held.
    """
    resolve(implementation)
    length = u.shape[1]
    size = min(chunk_size, length)
    u, dt, B, C, A, D, state = widened(*masked(valid, u, dt, B, C), A, D, initial_state)

    @jax.checkpoint
    def chunk(h: jax.Array, tokens: tuple) -> tuple[jax.Array, jax.Array]:
        u, dt, B, C, cut = tokens  # [C, B, ·]
        a = jnp.exp(dt[..., None] * A)  # [C, B, D, N]
        b = (dt * u)[..., None] * B[:, :, None]
        if cut is not None:
            (a,) = masked(~cut, a)
        reach = 1
        while reach < size:
            b = jnp.concatenate([b[:reach], a[reach:] * b[:-reach] + b[reach:]])
            a = jnp.concatenate([a[:reach], a[reach:] * a[:-reach]])
            reach *= 2
        states = a * h + b
        return states[-1], dot("tbdn,tbn->tbd", states, C)

    # [N, C, B, ·]; zeros after the end are tokens that are not valid
    by_chunk = jax.tree.map(lambda x: jnp.moveaxis(chunks(x, size), 0, 2), (u, dt, B, C, reset))
    state, y = lax.scan(chunk, state, by_chunk)
    return joined(jnp.moveaxis(y, 2, 0), length) + D * u, state
