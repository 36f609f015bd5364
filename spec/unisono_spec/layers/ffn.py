"""The feed-forward network: Linear(D→hidden), GELU-tanh, Linear(hidden→D)."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.layers.params import Rounding
from unisono_spec.ops.elementwise import gelu_tanh, linear


def ffn(p: Arrays, x: np.ndarray, rounded: Rounding) -> np.ndarray:
    """x [..., D] → [..., D]. p: up and down, weight and bias."""
    hidden = rounded(gelu_tanh(rounded(linear(x, p["up.weight"], p["up.bias"]))))
    return rounded(linear(hidden, p["down.weight"], p["down.bias"]))
