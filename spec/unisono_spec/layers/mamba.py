"""The Mamba block around its two ops: [u, z] = W_in x, u ← SiLU(conv(u)), y = S6(u), W_out (y ∘ SiLU(z)) (Gu & Dao 2024, figure 3).

p holds the block's parameters under their published names. State: the convolution's last inputs, and h.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.layers.params import Rounding
from unisono_spec.layers.reading import Reading
from unisono_spec.ops import selective_scan, short_conv
from unisono_spec.ops.elementwise import linear, silu, softplus

State = tuple[np.ndarray, np.ndarray]


def block(p: Arrays, x: np.ndarray, state: State, read: Reading, rounded: Rounding) -> tuple[np.ndarray, State]:
    """x [..., D] → [..., D], the state after it."""
    u, z = _inputs(p, x, rounded)
    u, conv = read(short_conv, u, p["conv1d.weight"], p.get("conv1d.bias"), state[0])
    u = rounded(silu(rounded(u)))
    y, ssm = read(selective_scan, u, *_selection(p, u, rounded), p["D"], state[1])
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
