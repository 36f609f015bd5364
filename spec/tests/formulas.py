"""Formulas that models written out by hand are made of, apart from the spec's own."""

from __future__ import annotations

import math

import numpy as np

P = dict[str, np.ndarray]


def linear(p: P, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def norm(p: P, name: str, x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    if f"{name}.bias" not in p:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * p[f"{name}.weight"]
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2)(x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigma(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def elu1(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def rotated(x: np.ndarray, position: np.ndarray | int) -> np.ndarray:
    """RoPE of [..., H, K] at `position` [...], as complex numbers."""
    half = x.shape[-1] // 2
    spin = np.exp(1j * np.asarray(position)[..., None] * 10000.0 ** (-np.arange(half) / half))[..., None, :]
    y = (x[..., :half] + 1j * x[..., half:]) * spin
    return np.concatenate([y.real, y.imag], -1)
