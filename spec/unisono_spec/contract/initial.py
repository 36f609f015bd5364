"""Initial values: drawn in NumPy from Philox(seed, parameter name), the same for every room."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Initial:
    """How a parameter starts.

    constant: `scale`; normal: N(0, scale²); uniform: U(low, scale); values: `values`, repeated over the leading axes;
    softplus_log_uniform: what softplus maps to a log-uniform draw from [low, scale].
    """

    kind: Literal["constant", "normal", "uniform", "values", "softplus_log_uniform"]
    scale: float = 0.0
    low: float = 0.0
    values: tuple[float, ...] = ()


ZEROS = Initial("constant", 0.0)
ONES = Initial("constant", 1.0)


def normal(std: float) -> Initial:
    return Initial("normal", std)


def uniform(low: float, high: float) -> Initial:
    return Initial("uniform", high, low)


def xavier_uniform(out: int, into: int) -> Initial:
    """U(±√(6 / (out + in))) (Glorot & Bengio 2010, eq 16)."""
    bound = math.sqrt(6 / (out + into))
    return uniform(-bound, bound)


def values(*numbers: float) -> Initial:
    return Initial("values", values=numbers)


def softplus_log_uniform(low: float, high: float) -> Initial:
    return Initial("softplus_log_uniform", high, low)


def generator(seed: int, name: str) -> np.random.Generator:
    """A Philox stream of its own for each (seed, name): adding a parameter never moves another's values."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.array([seed, int.from_bytes(digest[:8], "little")], dtype=np.uint64)))


def initialize(initial: Initial, shape: tuple[int, ...], seed: int, name: str) -> np.ndarray:
    """The float64 initial value of parameter `name`."""
    if initial.kind == "constant":
        return np.full(shape, initial.scale)
    if initial.kind == "values":
        return np.broadcast_to(np.array(initial.values), shape).copy()
    rng = generator(seed, name)
    if initial.kind == "normal":
        return rng.normal(0.0, initial.scale, shape)
    if initial.kind == "uniform":
        return rng.uniform(initial.low, initial.scale, shape)
    step = np.exp(rng.uniform(math.log(initial.low), math.log(initial.scale), shape))
    return np.log(np.expm1(step))
