"""One layer of CRAM's adaptive scheme: the score s_φ, the quadratic key k_Q, and the sum around them (eqs 7–10), with its departures."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.layers.ffn import ffn
from unisono_spec.layers.params import Rounding, exact, sub
from unisono_spec.layers.reading import Reading
from unisono_spec.ops import selective_scan, weighted_sum
from unisono_spec.ops.elementwise import binary_digits, gelu_tanh, layer_norm, linear, sigmoid, softplus

EPS = 1e-6  # beside the sum of weights


def scored_input(p: Arrays, config: CRAMConfig, x: np.ndarray, position: np.ndarray, rounded: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """x [..., D], position [...] → what is summed u [..., D], its weights s [..., 1], or [..., D]: s_φ([bits(p), uᵀQu / k_scale])."""
    if config.input_norm:
        x = rounded(layer_norm(x, p["input_norm.weight"], p["input_norm.bias"]))
    k = (x * rounded(linear(x, p["mixer.Q"]))).sum(-1, keepdims=True) / config.key_scale  # [..., 1]
    bits = binary_digits(position, config.position_bits, x.dtype)
    h = np.concatenate([bits, k], -1)  # [..., d_b + 1]
    h = gelu_tanh(linear(h, p["mixer.score.0.weight"], p["mixer.score.0.bias"]))
    h = gelu_tanh(linear(h, p["mixer.score.1.weight"], p["mixer.score.1.bias"]))
    return x, linear(h, p["mixer.score.2.weight"], p["mixer.score.2.bias"])


def summed(p: Arrays, config: CRAMConfig, u: np.ndarray, s: np.ndarray, sums: list[np.ndarray], read: Reading) -> tuple[np.ndarray, Arrays]:
    """u [..., D], s as `scored_input` gives them, the sums so far [B, D] → ξ [..., D], and the sums then, by their names.

    Eq 10, or ξ_t = λ ∘ ξ_{t−1} + (1−λ) ∘ s_t ∘ σ(u_t), which is a selective scan with Δ = B = C = 1 and A = log λ. A normalised ξ is
    S_t / z_t of S_t = λ ∘ S_{t−1} + w_t ∘ σ(u_t) and z_t = λ ∘ z_{t−1} + w_t, with w = softplus(s): there 1−λ would cancel.
    """
    if not config.retains:
        xi, last = read(weighted_sum, u, s[..., 0], *sums, more=(config.exclusive,))
        return xi, {"xi": last}
    w = softplus(s) if config.normalised else s
    rate = np.zeros(config.d_model, np.real(u).dtype)  # log λ
    if config.learned_decay:
        rate = -softplus(-p["mixer.decay"])
        w = w if config.normalised else sigmoid(-p["mixer.decay"]) * w
    terms = np.concatenate([w * sigmoid(u), w + np.zeros_like(u)], -1) if config.normalised else w * sigmoid(u)
    rates, one = np.tile(rate, len(sums))[:, None], np.ones_like(terms[..., :1])
    state = np.concatenate(sums, -1)[..., None]
    y, last = read(selective_scan, terms, np.ones_like(terms), rates, one, one, np.zeros_like(rates[:, 0]), state)
    if not config.normalised:
        return y, {"xi": last[..., 0]}
    (top, bottom), (xi, z) = np.split(y, 2, -1), np.split(last[..., 0], 2, -1)
    return top / (bottom + EPS), {"xi": xi, "z": z}


def ffn_update(p: Arrays, xi: np.ndarray, rounded: Rounding, u: np.ndarray | float = 0.0) -> np.ndarray:
    """FFN(LN(ξ) + u): ξ, u [..., D] → what it adds to x [..., D]."""
    return ffn(sub(p, "ffn"), rounded(layer_norm(xi, p["norm.weight"], p["norm.bias"]) + u), rounded)


def norm_after(p: Arrays, xi: np.ndarray, mask: np.ndarray | None, rounded: Rounding) -> np.ndarray:
    """ξ [..., D] → [..., D]: LN(ξ + FFN(ξ)), what stands for x with residual="after". mask: what dropout multiplies the FFN's output by."""
    # ξ is not rounded before the norm that follows it: a prefix sum stays wide
    update = ffn(sub(p, "ffn"), xi, exact)
    return rounded(layer_norm(xi + (update if mask is None else update * mask), p["norm.weight"], p["norm.bias"]))
