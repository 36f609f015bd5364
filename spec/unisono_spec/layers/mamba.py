"""The Mamba block around its two ops: [u, z] = W_in x, u ← SiLU(conv(u)), y = S6(u), W_out (y ∘ SiLU(z)) (Gu & Dao 2024, figure 3).

p holds the block's parameters under their published names. State: the convolution's last inputs, and h.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.layers.params import Rounding
from unisono_spec.ops import selective_scan, short_conv
from unisono_spec.ops.elementwise import linear, silu, softplus

State = tuple[np.ndarray, np.ndarray]


def token(
    p: Arrays, x: np.ndarray, state: State, reset: np.ndarray | None, valid: np.ndarray | None, rounded: Rounding
) -> tuple[np.ndarray, State]:
    """x [B, D] → [B, D], the state after it."""
    u, z = _inputs(p, x, rounded)
    u, conv = short_conv.step(u, p["conv1d.weight"], p.get("conv1d.bias"), state[0], reset, valid)
    u = rounded(silu(rounded(u)))
    y, ssm = selective_scan.step(u, *_selection(p, u, rounded), p["D"], state[1], reset, valid)
    return _output(p, y, z, rounded), (conv, ssm)


def sequence(
    p: Arrays, x: np.ndarray, state: State, reset: np.ndarray | None, valid: np.ndarray | None, chunk_size: int, rounded: Rounding
) -> tuple[np.ndarray, State]:
    """x [B, T, D] → [B, T, D], the state after the last token."""
    u, z = _inputs(p, x, rounded)
    u, conv = short_conv.parallel(u, p["conv1d.weight"], p.get("conv1d.bias"), state[0], reset, valid, chunk_size)
    u = rounded(silu(rounded(u)))
    y, ssm = selective_scan.parallel(u, *_selection(p, u, rounded), p["D"], state[1], reset, valid, chunk_size)
    return _output(p, y, z, rounded), (conv, ssm)


def _inputs(p: Arrays, x: np.ndarray, rounded: Rounding) -> tuple[np.ndarray, np.ndarray]:
    u, z = np.split(rounded(linear(x, p["in_proj.weight"], p.get("in_proj.bias"))), 2, -1)
    return u, z


def _selection(p: Arrays, u: np.ndarray, rounded: Rounding) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """u [..., inner] → Δ [..., inner], A [inner, N], B and C [..., N]."""
    rank, n = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    delta, B, C = np.split(rounded(linear(u, p["x_proj.weight"])), [rank, rank + n], -1)
    return softplus(linear(delta, p["dt_proj.weight"], p["dt_proj.bias"])), -np.exp(p["A_log"]), B, C


def _output(p: Arrays, y: np.ndarray, z: np.ndarray, rounded: Rounding) -> np.ndarray:
    return rounded(linear(rounded(rounded(y) * silu(z)), p["out_proj.weight"], p.get("out_proj.bias")))
