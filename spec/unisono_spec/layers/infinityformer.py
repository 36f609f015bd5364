"""InfinityFormer's mixer around its op: heads, decays, and the weights that gate and mix the scales."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.layers.ffn import gated_gelu
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import Rounding, sub
from unisono_spec.ops.elementwise import linear, sigmoid, softmax, softplus
from unisono_spec.ops.features import feature_map
from unisono_spec.ops.rotary import rotate


def mixer_inputs(
    p: Arrays, config: InfinityFormerConfig, x: np.ndarray, position: np.ndarray, rounded: Rounding
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x [..., D], position [...] → q, k, v, q_norm, k_norm, log_decay, weight, as ops/multiscale.py takes them."""
    h = norm(p, "mixer_norm", x, rounded)
    heads = (*x.shape[:-1], config.n_heads, config.head_width)
    q, k, v = (part.reshape(heads) for part in np.split(rounded(linear(h, p["mixer.qkv.weight"], p["mixer.qkv.bias"])), 3, -1))

    def rotated(a: np.ndarray) -> np.ndarray:
        return rotate(a, position, config.rope_base)

    if config.rope == "before":
        q, k = rotated(q), rotated(k)
    q_norm, k_norm = (feature_map(config.feature_map, a, p.get("mixer.tau")) for a in (q, k))
    q, k = (rotated(q_norm), rotated(k_norm)) if config.rope == "numerator" else (q_norm, k_norm)

    a = p["mixer.decay.bias"] if config.decay == "learned" else linear(h, p["mixer.decay.weight"], p["mixer.decay.bias"])
    memories = np.broadcast_to(-softplus(-a), (*x.shape[:-1], config.n_scales))  # log λ = log σ(a), always finite
    log_decay = np.concatenate([np.zeros_like(memories[..., :1]), memories], -1)  # the context path does not forget

    logit = linear(h, p["mixer.gate.weight"], p["mixer.gate.bias"])  # [..., 1 or D]
    logit = logit.reshape(heads if config.gate == "vector" else (*x.shape[:-1], 1, 1))[..., None, :, :]
    shares = softmax(p["mixer.mix"])[:, None, None]
    weight = np.concatenate([sigmoid(logit), sigmoid(-logit) * shares], -3)  # [..., S+1, H or 1, V or 1]; 1 − g keeps its digits
    return q, k, v, q_norm, k_norm, log_decay, weight


def mixer_update(p: Arrays, o: np.ndarray, rounded: Rounding) -> np.ndarray:
    """o [..., H, V] → [..., D]."""
    return rounded(linear(rounded(o.reshape(*o.shape[:-2], o.shape[-2] * o.shape[-1])), p["mixer.out.weight"], p["mixer.out.bias"]))


def ffn_update(p: Arrays, x: np.ndarray, rounded: Rounding) -> np.ndarray:
    """x [..., D] → what the FFN adds to it."""
    return gated_gelu(sub(p, "ffn"), norm(p, "ffn_norm", x, rounded), rounded)
