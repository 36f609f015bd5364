"""Looking up a layer's own parameters, and perturbing what layers hand on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unisono_spec.contract.base import Arrays

# What a layer's outputs go through: nothing in the truth; a random error of a dtype's size (Monte Carlo arithmetic) when the court asks
# what rounding alone would cost.
Rounding = Callable[[np.ndarray], np.ndarray]


def exact(x: np.ndarray) -> np.ndarray:
    return x


def sub(params: Arrays, prefix: str) -> Arrays:
    """The parameters below `prefix.`, with that prefix removed."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in params.items() if name.startswith(start)}
