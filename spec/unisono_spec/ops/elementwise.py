"""Functions without memory. Each is analytic, so that the complex step differentiates it: no abs, no conjugate, no np.var.

Each is right to a few roundings of itself: where it falls to 0, no 1 is added that takes its digits.
"""

from __future__ import annotations

import math

import numpy as np

LAYER_NORM_EPS = 1e-5
SHRINK = 2.0**-40  # of rows before they are squared; with ε shrunk alike a norm stays what it is
RMS_NORM_EPS = 1e-6

_erfc = np.frompyfunc(math.erfc, 1, 1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """[...] → [...]: the logistic function σ, by e^−|x|: finite for every x. 1 − σ(x) is σ(−x)."""
    positive = np.real(x) > 0
    e = np.exp(np.where(positive, -x, x))
    return np.where(positive, 1, e) / (1 + e)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """[...] → [...]: GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), whose ½(1 + tanh u) is σ(2u)."""
    return x * sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def erfc(x: np.ndarray) -> np.ndarray:
    """[...] → [...]: 1 − erf(x). Of a complex argument: to first order in the imaginary part, as the complex step reads it."""
    real = np.real(x)
    value = np.asarray(_erfc(real), np.asarray(real).dtype)
    if not np.iscomplexobj(x):
        return value
    return value - 1j * (2 / math.sqrt(math.pi) * np.exp(-real * real)) * np.imag(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """[...] → [...]: GELU, exact: x Φ(x) (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * erfc(x * -(0.5**0.5))


def silu(x: np.ndarray) -> np.ndarray:
    """[...] → [...]: x σ(x)."""
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """[...] → [...]: log(1 + e^x) at every x, with no threshold."""
    positive = np.real(x) > 0
    e = np.exp(np.where(positive, -x, x))
    real = np.real(e)
    log = np.log1p(real)
    if np.iscomplexobj(x):  # NumPy's complex log1p adds the 1, and a small e has no digits left; the slope as the complex step reads it
        log = log + 1j * (np.imag(e) / (1 + real))
    return np.where(positive, x, 0) + log


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float = RMS_NORM_EPS) -> np.ndarray:
    """x [..., D] → [..., D]: RMSNorm, ε = 1e-6 unless told (Zhang & Sennrich 2019, eq 4); of entries whose squares the dtype
    holds: beyond, it falls to 0."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    """[..., N] → [..., N]: over the last axis; shifted by the largest real part, which changes nothing."""
    weight = np.exp(x - np.real(x).max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """x [..., D] → [..., D]: LayerNorm, ε = 1e-5 (Ba et al. 2016, eq 3); in float32 too of entries up to 10²⁹, whose squares it does not
    hold."""
    centred = (x - x.mean(-1, keepdims=True)) * SHRINK
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + LAYER_NORM_EPS * SHRINK**2) * weight + bias


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [..., in], weight [out, in], bias [out] → [..., out]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def binary_digits(n: np.ndarray, digits: int, dtype: np.dtype) -> np.ndarray:
    """The last `digits` binary digits of non-negative integers, most significant first: [...] → [..., digits]."""
    shifts = np.arange(digits - 1, -1, -1)
    return ((n[..., None].astype(np.int64) >> shifts) & 1).astype(dtype)
