"""The selective scan by jax-linear-attention (Apache 2.0, an extra of its own), whose Mosaic kernels are for Hopper."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from unisono_jax.kernels import selective_scan
from unisono_jax.kernels.operator import operator

CHANNELS, TOKENS, STATES = 128, 32, (4, 8, 16, 32)  # its widths: multiples, and these
SEGMENTS = 6  # of a sequence's time that Pallas' kernel makes side by side where its values take less time than this one's


def _scan(arrays: Any, reset: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """It is given u and Δ of one dtype, float32, and zeros up to its widths: Δ = 0 keeps a state."""
    u, dt, A, B, C, D, state = arrays
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


def _pulled(arrays: Any, reset: jax.Array | None) -> Any:
    return jax.vjp(lambda *given: _scan(given, reset), *arrays)


def _forward(_: bool, arrays: Any, reset: jax.Array | None) -> Any:
    outputs, pull = _pulled(arrays, reset)
    return outputs, tuple(jax.tree.leaves(pull))


def _backward(_: bool, arrays: Any, reset: jax.Array | None, saved: Any, cotangents: Any) -> Any:
    pull = jax.tree.structure(jax.eval_shape(_pulled, arrays, reset)[1])  # traced again, and not computed
    return jax.tree.unflatten(pull, saved)(cotangents)


def _values(_: bool, arrays: Any, reset: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Outputs without a gradient: this kernel leaves a sequence's time whole, which few channels cannot make up for."""
    batch, length, width = arrays[0].shape
    if selective_scan.segments(batch, length, width) < SEGMENTS:
        return _scan(arrays, reset)
    return selective_scan.forward(False, arrays, reset)[0]


_run = operator(_forward, _backward, selective_scan.plain)
_run_quickest = operator(_forward, _backward, selective_scan.plain, _values)


def scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    state: jax.Array,
    reset: jax.Array | None = None,
    quickest: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """u, dt [B, T, D], A [D, N], B, C [B, T, N], D [D], state [B, D, N], reset [B, T] or None → y, the final state, in float32.

    quickest: values whose gradient nobody asks are made by Pallas' kernel where that is the faster one.
    """
    dt, A, D, state = (a.astype(jnp.float32) for a in (dt, A, D, state))
    return (_run_quickest if quickest else _run)(False, (u, dt, A, B, C, D, state), reset)
