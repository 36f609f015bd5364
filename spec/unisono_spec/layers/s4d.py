"""S4D's layer around its op: Δ and A from their logarithms, and GELU, Linear(D→2D), GLU after it."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.layers.params import Rounding
from unisono_spec.ops.elementwise import gelu, linear, sigmoid


def dynamics(p: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Δ [D], A [D, P, 2], C [D, P, 2], D [D]. The real part of A is −exp(log_A_real), always negative."""
    A = np.stack([-np.exp(p["mixer.log_A_real"]), p["mixer.A_imag"]], -1)
    return np.exp(p["mixer.log_dt"]), A, p["mixer.C"], p["mixer.D"]


def mixer_update(p: Arrays, y: np.ndarray, rounded: Rounding) -> np.ndarray:
    """y [..., D] → what the mixer adds to x [..., D]."""
    hidden = rounded(gelu(rounded(y)))
    value, gate = np.split(rounded(linear(hidden, p["mixer.out.weight"], p["mixer.out.bias"])), 2, -1)
    return rounded(value * sigmoid(gate))
