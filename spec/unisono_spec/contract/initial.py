"""Initial values: drawn in NumPy from Philox(seed, parameter name), the same for every room."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Initial:
    """How a parameter starts: a constant, or N(0, scale²)."""

    kind: Literal["constant", "normal"]
    scale: float


ZEROS = Initial("constant", 0.0)
ONES = Initial("constant", 1.0)


def normal(std: float) -> Initial:
    return Initial("normal", std)


def generator(seed: int, name: str) -> np.random.Generator:
    """A Philox stream of its own for each (seed, name): adding a parameter never moves another's values."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.array([seed, int.from_bytes(digest[:8], "little")], dtype=np.uint64)))


def draw(initial: Initial, shape: tuple[int, ...], seed: int, name: str) -> np.ndarray:
    """The float64 initial value of parameter `name`."""
    if initial.kind == "constant":
        return np.full(shape, initial.scale)
    return generator(seed, name).normal(0.0, initial.scale, shape)
