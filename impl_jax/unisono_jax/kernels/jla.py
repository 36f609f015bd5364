"""The selective scan by jax-linear-attention (Apache 2.0, an extra of its own), whose Mosaic kernels are for Hopper."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp

CHANNELS, TOKENS, STATES = 128, 32, (4, 8, 16, 32)  # its widths: multiples, and these


def scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    state: jax.Array,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """u, dt [B, T, D], A [D, N], B, C [B, T, N], D [D], state [B, D, N], reset [B, T] or None → y, the final state, in float32.

    It is given u and Δ of one dtype, float32, and zeros up to its widths: Δ = 0 keeps a state.
    """
    (_, length, width), states = u.shape, A.shape[1]
    time, channel, more = -length % TOKENS, -width % CHANNELS, next(n for n in STATES if n >= states) - states

    def padded(a: jax.Array, *behind: int) -> jax.Array:
        return jnp.pad(a.astype(jnp.float32), [(0, n) for n in behind])

    if reset is not None:  # to it, a sequence that begins at the first token is the one that the state is of
        state = jnp.where(reset[:, 0, None, None], 0, state)
        reset = jnp.pad(jnp.cumsum(reset, axis=1, dtype=jnp.int32), ((0, 0), (0, time)), mode="edge")
    y, last = importlib.import_module("jla.ops.mosaic_gpu.mamba1").mamba1(
        padded(C, 0, time, more),
        padded(B, 0, time, more),
        padded(u, 0, time, channel),
        padded(dt, 0, time, channel),
        padded(A, channel, more),
        d=padded(D, channel),
        initial_state=padded(state, 0, channel, more),
        output_final_state=True,
        segment_ids=reset,
    )
    return y[:, :length, :width], last[:, :width, :states]
