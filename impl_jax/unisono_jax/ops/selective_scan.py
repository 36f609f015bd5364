"""The selective scan of Mamba, S6 (Gu & Dao 2024, eq 2a–2b and algorithm 2, with B discretised as Δ B):

h_t = exp(Δ_t A) ∘ h_{t−1} + Δ_t B_t u_t,  y_t = C_t h_t + D ∘ u_t.

Shapes, with D channels of N states: u, dt (Δ > 0) [B, T, D], A (< 0) [D, N], B, C [B, T, N], D [D], state h [B, D, N], reset and
valid [B, T] bool or None. Each form returns (y [B, T, D], final state), float32 or wider. y is 0 where a token is not valid.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from unisono_spec.contract.shapes import shaped

from unisono_jax.ops.carry import chunk_length, chunks, joined
from unisono_jax.ops.elementwise import dot, masked, restarted, widened
from unisono_jax.ops.fold import fold
from unisono_jax.registry import chosen


@shaped
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


@shaped
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
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    u, dt, A, B, C, D, state = widened(u, dt, A, B, C, D, initial_state)
    return fold(lambda u, dt, B, C, *rest: step(u, dt, A, B, C, D, *rest), (u, dt, B, C), state, reset, valid)


@shaped
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
    """Chunks of C tokens are computed again for the gradient: states [D, N] of one chunk's tokens are all that is ever held.

    Inside a chunk, a token after the other; on a GPU, where that is a launch each, rows of about √C: the maps h → a h + b are composed
    down all rows at once, then h goes from row to row. A reset is a map with a = 0, a token that is not valid one with a = 1 and b = 0.
    """
    initial_state = restarted(reset, initial_state)
    widest = jnp.result_type(u, *(a for a in (dt, A, B, C, D, initial_state) if a.dtype == jnp.float64))
    served = chosen(implementation, "selective_scan", widest, {"N": A.shape[-1]}, u.size)
    if served != "plain":
        from unisono_jax.kernels import jla, selective_scan

        u, dt, B, C = masked(valid, u, dt, B, C)
        given = u, dt, A, B, C, D, initial_state, reset
        return jla.scan(*given, quickest=implementation == "auto") if served == "jla" else selective_scan.scan(*given)
    length = u.shape[1]
    size = chunk_length(chunk_size, length)
    rows = math.isqrt(size - 1) + 1 if jax.default_backend() == "gpu" else 1
    width = -(-size // rows)  # tokens a row
    u, dt, B, C, A, D, state = widened(*masked(valid, u, dt, B, C), A, D, initial_state)

    @jax.checkpoint
    def chunk(h: jax.Array, tokens: tuple) -> tuple[jax.Array, jax.Array]:
        return _composed(h, tokens, A, rows) if rows > 1 else lax.scan(functools.partial(_token, A), h, tokens)

    # [N, C, B, ·], whole rows; zeros after the end are tokens that are not valid
    by_chunk = jax.tree.map(lambda x: jnp.moveaxis(chunks(x, rows * width), 0, 2), (u, dt, B, C, reset))
    state, y = lax.scan(chunk, state, by_chunk)
    return joined(jnp.moveaxis(y, 2, 0), length) + D * u, state


def _token(A: jax.Array, h: jax.Array, token: tuple) -> tuple[jax.Array, jax.Array]:
    """h [B, D, N] after a token, and what C reads of it [B, D]."""
    u, dt, B, C, cut = token
    if cut is not None:
        (h,) = masked(~cut, h)
    h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]
    return h, (h * C[:, None]).sum(-1)


def _composed(h: jax.Array, tokens: tuple, A: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """h [B, D, N] after the tokens of a chunk [C, B, ·], and what C reads of it [C, B, D]."""

    def compose(before: tuple[jax.Array, jax.Array], token: tuple[jax.Array, jax.Array]) -> Any:
        a, b = token
        both = a * before[0], a * before[1] + b
        return both, both

    u, dt, B, C, cut = jax.tree.map(lambda x: x.reshape(rows, len(x) // rows, *x.shape[1:]).swapaxes(0, 1), tokens)  # [T', R, B, ·]
    a = jnp.exp(dt[..., None] * A)  # [T', R, B, D, N]
    b = (dt * u)[..., None] * B[..., None, :]
    if cut is not None:
        (a,) = masked(~cut, a)
    whole, upto = lax.scan(compose, (jnp.ones_like(a[0]), jnp.zeros_like(b[0])), (a, b))
    last, entry = lax.scan(lambda h, row: (row[0] * h + row[1], h), h, whole)  # [R, B, D, N]
    y = dot("trbdn,trbn->rtbd", upto[0] * entry + upto[1], C)
    return last, y.reshape(len(tokens[0]), *y.shape[2:])
