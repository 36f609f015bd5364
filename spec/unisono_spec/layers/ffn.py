"""Feed-forward networks: functions of a parameter dictionary (up, down, and gate where there is one) and x [..., D]."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.layers.params import Rounding
from unisono_spec.ops.elementwise import gelu, gelu_tanh, linear, sigmoid, silu


def ffn(p: Arrays, x: np.ndarray, rounded: Rounding) -> np.ndarray:
    """x [..., D] → [..., D]: Linear(D→hidden), GELU-tanh, Linear(hidden→D)."""
    hidden = rounded(gelu_tanh(rounded(linear(x, p["up.weight"], p["up.bias"]))))
    return rounded(linear(hidden, p["down.weight"], p["down.bias"]))


def gelu_ffn(p: Arrays, x: np.ndarray, rounded: Rounding) -> np.ndarray:
    """x [..., D] → [..., D]: Linear(D→hidden), exact GELU, Linear(hidden→D)."""
    hidden = rounded(gelu(rounded(linear(x, p["up.weight"], p.get("up.bias")))))
    return rounded(linear(hidden, p["down.weight"], p.get("down.bias")))


def swiglu(p: Arrays, x: np.ndarray, rounded: Rounding) -> np.ndarray:
    """x [..., D] → [..., D]: down(SiLU(gate x) ∘ up x) (Shazeer 2020, eq 6)."""
    gate = rounded(linear(x, p["gate.weight"], p.get("gate.bias")))
    hidden = rounded(silu(gate) * rounded(linear(x, p["up.weight"], p.get("up.bias"))))
    return rounded(linear(hidden, p["down.weight"], p.get("down.bias")))


def gated_gelu(p: Arrays, x: np.ndarray, rounded: Rounding) -> np.ndarray:
    """x [..., D] → [..., D], InfinityFormer's: [a, b] = up x, down(GELU(a ∘ σ(b))), exact GELU."""
    a, b = np.split(rounded(linear(x, p["up.weight"], p["up.bias"])), 2, -1)
    return rounded(linear(rounded(gelu(a * sigmoid(b))), p["down.weight"], p["down.bias"]))
