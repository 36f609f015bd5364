"""LAT's layers around their ops: projections to heads and back, and the gated short convolution of Based."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.lat import LATConfig
from unisono_spec.layers.ffn import gelu_ffn, swiglu
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import Rounding, sub
from unisono_spec.ops.elementwise import linear, silu
from unisono_spec.ops.features import feature_map
from unisono_spec.ops.rotary import rotate

Heads = tuple[np.ndarray, np.ndarray, np.ndarray]


def to_heads(p: Arrays, config: LATConfig, kind: str, x: np.ndarray, position: np.ndarray, rounded: Rounding) -> Heads:
    """x [..., D], position [...] → q, k, v [..., H, ·], turned by their position, and through φ for linear attention."""
    h = norm(p, "mixer_norm", x, rounded)
    width = config.qk_width if kind == "linear" else config.head_width
    y = rounded(linear(h, p["mixer.qkv.weight"], p.get("mixer.qkv.bias")))
    n = config.n_heads * width
    q, k, v = (part.reshape(*x.shape[:-1], config.n_heads, part.shape[-1] // config.n_heads) for part in np.split(y, [n, 2 * n], -1))
    if config.positions == "rope":
        q, k = rotate(q, position, config.rope_base), rotate(k, position, config.rope_base)
    if kind == "linear":
        tau = p.get("mixer.tau")
        q, k = feature_map(config.feature_map, q, tau), feature_map(config.feature_map, k, tau)
    return q, k, v


def from_heads(p: Arrays, o: np.ndarray, rounded: Rounding) -> np.ndarray:
    """o [..., H, V] → [..., D], each head through a norm where there is one."""
    o = rounded(o)
    if "mixer.head_norm.weight" in p:
        o = norm(p, "mixer.head_norm", o, rounded)
    return rounded(linear(o.reshape(*o.shape[:-2], o.shape[-2] * o.shape[-1]), p["mixer.out.weight"], p.get("mixer.out.bias")))


def conv_inputs(p: Arrays, x: np.ndarray, rounded: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """x [..., D] → the gate a and the convolution's input b, [..., inner]."""
    h = norm(p, "mixer_norm", x, rounded)
    a, b = np.split(rounded(linear(h, p["mixer.input.weight"], p.get("mixer.input.bias"))), 2, -1)
    return a, b


def conv_output(p: Arrays, a: np.ndarray, y: np.ndarray, rounded: Rounding) -> np.ndarray:
    """W_o (SiLU(a) ∘ y): [..., inner] → [..., D]."""
    return rounded(linear(rounded(silu(a) * rounded(y)), p["mixer.out.weight"], p.get("mixer.out.bias")))


def ffn_update(p: Arrays, config: LATConfig, x: np.ndarray, rounded: Rounding) -> np.ndarray:
    """x [..., D] → what the FFN adds to it."""
    network = swiglu if config.ffn == "swiglu" else gelu_ffn
    return network(sub(p, "ffn"), norm(p, "ffn_norm", x, rounded), rounded)
