"""Rotary position embedding (Su et al. 2021, eq 34), half-split: component i turns with component i + K/2.

A position is read as four digits in base 256. The turn of each is looked up in a table made in float64, and the turns are
multiplied as complex numbers: right to a few roundings at every int32, where a float32 angle p·f is wrong by 1e-2 at 200,000.

Shapes: x [..., H, K], position [...] int32, cos and sin [..., K/2].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unisono_jax.ops.elementwise import wide

DIGITS, BITS = 4, 8
TWO_PI = np.longdouble("6.283185307179586476925286766559005768")  # 2π: angles of many turns lose digits before cos
CosSin = tuple[jax.Array, jax.Array]


@lru_cache(maxsize=16)
def _tables(width: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every digit's angle, [4, 256, K/2] each, in float64."""
    frequency = base ** (-2.0 * np.arange(width // 2) / width)  # [K/2]
    number = np.arange(1 << BITS, dtype=np.longdouble) * 2.0 ** (BITS * np.arange(DIGITS)[:, None])  # [4, 256]
    angle = np.mod(number[..., None] * frequency, TWO_PI)
    return np.cos(angle).astype(np.float64), np.sin(angle).astype(np.float64)


def cos_sin(position: jax.Array, width: int, base: float = 10000.0, dtype: Any = jnp.float32) -> CosSin:
    """position [...] → cos and sin of its angles [..., K/2] in `dtype`."""
    cosines, sines = (jnp.asarray(table, dtype) for table in _tables(width, base))

    def digit(place: int) -> CosSin:
        index = (position >> (BITS * place)) & ((1 << BITS) - 1)
        return cosines[place][index], sines[place][index]

    def both(a: CosSin, b: CosSin) -> CosSin:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]

    return both(both(digit(0), digit(1)), both(digit(2), digit(3)))


def rotate_by(x: jax.Array, angles: CosSin) -> jax.Array:
    """x [..., H, K] → [..., H, K]: turn each head of x; float32 or wider. Lengths stay as they are."""
    cos, sin = (a[..., None, :] for a in angles)
    first, second = jnp.split(x.astype(wide(x)), 2, -1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def rotate(x: jax.Array, position: jax.Array, base: float = 10000.0) -> jax.Array:
    """x [..., H, K] → [..., H, K]: turn each head of x by the angles of its position."""
    return rotate_by(x, cos_sin(position, x.shape[-1], base, wide(x)))
