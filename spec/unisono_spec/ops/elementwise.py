"""Functions without memory. Each is analytic, so that the complex step differentiates it: no abs, no conjugate, no np.var."""

from __future__ import annotations

import numpy as np

LAYER_NORM_EPS = 1e-5


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function σ, in tanh form: finite for every x."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(x.real.dtype) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """LayerNorm over the last axis, ε = 1e-5 (Ba et al. 2016, eq 3)."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + LAYER_NORM_EPS) * weight + bias


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [..., in], weight [out, in], bias [out] → [..., out]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def binary_digits(n: np.ndarray, digits: int, dtype: np.dtype) -> np.ndarray:
    """The last `digits` binary digits of non-negative integers, most significant first: [...] → [..., digits]."""
    shifts = np.arange(digits - 1, -1, -1)
    return ((n[..., None].astype(np.int64) >> shifts) & 1).astype(dtype)
