"""Functions without memory where they fall to 0: each value, slope and curvature is held to itself, not to the largest of an array.

A function, its terms and the exponents that it takes are written out in float64 by what loses nothing: e^−|x|, erfc, log1p. An exponent z
that errs by a rounding costs |z| roundings of e^z, so that the budget is the op's formula times 1 + |z|; where e^−|z| is 0, nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from unisono_spec.contract.base import DTYPES, state_dtype

from unisono_conformance.judging import judge, numerics

_erfc = np.frompyfunc(math.erfc, 1, 1)
FADED = 746.0  # from here on e^−|z| is 0 in float64

# of a function, by its derivative (0, 1, 2): values, and the absolute terms that add up to them
Orders = tuple[tuple[np.ndarray, np.ndarray], ...]


def _logistic(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """σ(x), σ(−x) and their product."""
    e = np.exp(-np.abs(x))
    up, down = 1 / (1 + e), e / (1 + e)
    return np.where(x > 0, up, down), np.where(x > 0, down, up), up * down


def sigmoid(x: np.ndarray) -> tuple[Orders, np.ndarray]:
    y, rest, slope = _logistic(x)
    return ((y, y), (slope, slope), (slope * (rest - y), slope)), np.abs(x)


def tanh(x: np.ndarray) -> tuple[Orders, np.ndarray]:
    y, slope = np.tanh(x), 4 * _logistic(2 * x)[2]
    return ((y, np.abs(y)), (slope, slope), (-2 * y * slope, 2 * slope)), 2 * np.abs(x)


def softplus(x: np.ndarray) -> tuple[Orders, np.ndarray]:
    y = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    first, _, second = _logistic(x)
    return ((y, y), (first, first), (second, second)), np.abs(x)


def log_sigmoid(x: np.ndarray) -> tuple[Orders, np.ndarray]:
    ((y, _), (first, _), (second, _)), exponent = softplus(-x)
    return ((-y, y), (first, first), (-second, second)), exponent


def _gated(x: np.ndarray, z: np.ndarray, first: np.ndarray | float, second: np.ndarray | float) -> tuple[Orders, np.ndarray]:
    """x σ(z), by the derivatives of z."""
    y, rest, slope = _logistic(z)
    curved = slope * (rest - y)
    return (
        (x * y, np.abs(x) * y),
        (y + x * first * slope, y + np.abs(x * first) * slope),
        (2 * first * slope + x * (second * slope + first**2 * curved), 2 * first * slope + np.abs(x) * (np.abs(second) + first**2) * slope),
    ), np.abs(z)


def silu(x: np.ndarray) -> tuple[Orders, np.ndarray]:
    return _gated(x, x, 1.0, 0.0)


def gelu_tanh(x: np.ndarray) -> tuple[Orders, np.ndarray]:
    c, d = np.sqrt(8 / np.pi), np.sqrt(8 / np.pi) * 0.044715
    return _gated(x, c * x + d * x**3, c + 3 * d * x**2, 6 * d * x)


def gelu(x: np.ndarray) -> tuple[Orders, np.ndarray]:
    share, bell = np.asarray(_erfc(-x / np.sqrt(2)), np.float64) / 2, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return (
        (x * share, np.abs(x) * share),
        (share + x * bell, share + np.abs(x) * bell),
        (bell * (2 - x**2), bell * (2 + x**2)),
    ), x**2


def elu1(x: np.ndarray) -> tuple[Orders, np.ndarray]:
    e, below = np.exp(np.minimum(x, 0)), x < 0
    y = np.where(below, e, x + 1)
    return ((y, y), (e, e), (e * below, e * below)), np.abs(x)


FUNCTIONS: dict[str, Callable[[np.ndarray], tuple[Orders, np.ndarray]]] = {
    function.__name__: function for function in (sigmoid, tanh, softplus, log_sigmoid, silu, gelu_tanh, gelu, elu1)
}


def points(name: str, dtype: str) -> np.ndarray:
    """Where to look: on both sides of 0, as far as the function and its derivatives are normal numbers."""
    far = 80.0 if name not in ("gelu", "gelu_tanh") else 12.0 if name == "gelu" else 8.0
    x = np.geomspace(0.01, min(far, 8.0 if dtype == "float16" else far), 60)
    return np.concatenate([-x[::-1], x]).astype(DTYPES[dtype])


def limits(dtype: str) -> np.ndarray:
    """Where a function and its derivatives are their limits, though the square or the cube of x be infinite."""
    x = np.geomspace(1e3, 8e3 if dtype == "float16" else 1e37, 4)
    return np.concatenate([-x[::-1], x]).astype(DTYPES[dtype])


def hold(name: str, found: Any, x: np.ndarray, dtype: str, order: int = 0) -> float:
    """Hold the `order`-th derivative of FUNCTIONS[name] at x, as `dtype` rounds it, to its truth; the worst share of the budget."""
    orders, exponent = FUNCTIONS[name](np.asarray(x, np.float64))
    value, terms = orders[order]
    # the exponent is known as well as the accumulator holds it; the result is rounded once
    inner = numerics.formula(state_dtype(dtype), 1, gradient=order > 0) * (1 + np.where(exponent < FADED, exponent, 0))
    outer = numerics.formula(dtype, 1, order + 1, gradient=order > 0) if dtype != state_dtype(dtype) else 0.0
    return judge.within(np.asarray(found, np.float64), value, (inner + outer) * terms + numerics.TINY[dtype], f"{name}, derivative {order}")
