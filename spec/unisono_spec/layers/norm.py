"""The norm that a config names, from its parameters: LayerNorm has a bias, RMSNorm none."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.layers.params import Rounding
from unisono_spec.ops.elementwise import RMS_NORM_EPS, layer_norm, rms_norm


def norm(p: Arrays, name: str, x: np.ndarray, rounded: Rounding, eps: float = RMS_NORM_EPS) -> np.ndarray:
    """x [..., D] → [..., D]. eps: RMSNorm's ε."""
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    return rounded(rms_norm(x, weight, eps) if bias is None else layer_norm(x, weight, bias))
