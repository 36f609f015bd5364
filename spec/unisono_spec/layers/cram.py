"""One layer of CRAM's adaptive scheme: the score s_φ, the quadratic key k_Q, and the sum around them (eqs 7–10)."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.layers.ffn import ffn
from unisono_spec.layers.params import Rounding, exact, sub
from unisono_spec.ops.elementwise import binary_digits, gelu_tanh, layer_norm, linear


def scored_input(p: Arrays, config: CRAMConfig, x: np.ndarray, position: np.ndarray, rounded: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """x [..., D], position [...] → what is summed [..., D], and its weight s [...]: s_φ([bits(p), xᵀQx / k_scale])."""
    if config.input_norm:
        x = rounded(layer_norm(x, p["input_norm.weight"], p["input_norm.bias"]))
    k = (x * rounded(linear(x, p["mixer.Q"]))).sum(-1, keepdims=True) / config.key_scale  # [..., 1]
    bits = binary_digits(position, config.position_bits, x.dtype)
    h = np.concatenate([bits, k], -1)  # [..., d_b + 1]
    h = gelu_tanh(linear(h, p["mixer.score.0.weight"], p["mixer.score.0.bias"]))
    h = gelu_tanh(linear(h, p["mixer.score.1.weight"], p["mixer.score.1.bias"]))
    return x, linear(h, p["mixer.score.2.weight"], p["mixer.score.2.bias"])[..., 0]


def ffn_update(p: Arrays, xi: np.ndarray, rounded: Rounding) -> np.ndarray:
    """FFN(LN(ξ)): ξ [..., D] → what it adds to x [..., D]."""
    return ffn(sub(p, "ffn"), rounded(layer_norm(xi, p["norm.weight"], p["norm.bias"])), rounded)


def norm_after(p: Arrays, xi: np.ndarray, mask: np.ndarray | None, rounded: Rounding) -> np.ndarray:
    """ξ [..., D] → [..., D]: LN(ξ + FFN(ξ)), what stands for x with residual="after". mask: what dropout multiplies the FFN's output by."""
    # ξ is not rounded before the norm that follows it: a prefix sum stays wide
    update = ffn(sub(p, "ffn"), xi, exact)
    return rounded(layer_norm(xi + (update if mask is None else update * mask), p["norm.weight"], p["norm.bias"]))
