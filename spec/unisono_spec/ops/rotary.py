"""Rotary position embedding (Su et al. 2021, eq 34), half-split: component i turns with component i + K/2.

Shapes: x [..., H, K], position [...] int32.
"""

from __future__ import annotations

import functools

import numpy as np

TURN = np.longdouble("6.283185307179586476925286766559005768")  # 2π


def angles(position: np.ndarray, width: int, base: float = 10000.0) -> np.ndarray:
    """position [...] → angles [..., width/2] in radians, within [0, 2π), in NumPy's widest float.

    The angle of p is the sum of the angles of its digits in base 2¹⁰, each looked up in a table of wide numbers that are
    reduced to one turn. A float32 product p·f would be wrong by 1e-2 at 200,000, a float64 one by 1e-13.
    """
    total = np.zeros((*position.shape, width // 2), np.longdouble)
    for place in (1, 1 << 10, 1 << 20, 1 << 30):
        total += _table(place, width, base)[(position.astype(np.int64) // place) % 1024]
    return np.mod(total, TURN)


@functools.cache
def _table(place: int, width: int, base: float) -> np.ndarray:
    """Angles of 0 … 1023 times `place`, within one turn: [1024, K/2]."""
    frequency = base ** (-2.0 * np.arange(width // 2) / width)
    return np.mod(np.outer(np.arange(1024, dtype=np.longdouble) * place, frequency), TURN)


def rotate(x: np.ndarray, position: np.ndarray, base: float = 10000.0) -> np.ndarray:
    """x [..., H, K] → [..., H, K]: turn each head of x by the angles of its position; lengths stay as they are."""
    angle = angles(position, x.shape[-1], base)[..., None, :]  # [..., 1, K/2]
    real = np.real(x).dtype
    cos, sin = np.cos(angle).astype(real), np.sin(angle).astype(real)
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)
