"""Mistakes of wiring, which every architecture is judged by: both forms of a model share it, and no comparison of forms finds them."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
from unisono_spec.contract.base import Arrays, Config
from unisono_spec.models.base import Model

from unisono_conformance.judging.patches import Patch
from unisono_conformance.sabotage import Sabotage


def sabotages(arch: str) -> tuple[Sabotage, ...]:
    model = importlib.import_module(f"unisono_spec.models.{arch}").MODEL
    return (
        Sabotage("a residual left out", "P1", (_residual_left_out(),)),
        Sabotage("two norms swapped", "P1", ((model, "_read", _reading(model, params=_two_norms)),)),
        Sabotage("state of another layer", "P1", ((model, "_read", _reading(model, state=_other_layer)),)),
    )


def _residual_left_out() -> Patch:
    """The first update of each reading stands alone."""
    updated, count = Model._updated, itertools.count()

    def run(self: Model, x: np.ndarray, update: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return updated(self, x * (next(count) % self.config.n_updates > 0), update, mask)

    return Model, "_updated", run


def _reading(model: Any, params: Any = None, state: Any = None) -> Any:
    """`_read` with parameters, or states, under each other's names: `params(config)` and `state(config)` give pairs of prefixes."""
    read = model._read

    def run(self: Model, tokens: np.ndarray, given: Arrays, *more: Any) -> tuple[np.ndarray, Arrays]:
        kept = self.params
        try:
            self.params = kept if params is None else _renamed(kept, params(self.config))
            return read(self, tokens, given if state is None else _renamed(given, state(self.config)), *more)
        finally:
            self.params = kept

    return run


def _renamed(arrays: Arrays, pair: tuple[str, ...]) -> Arrays:
    def other(name: str) -> str:
        for a, b in (pair, pair[::-1]) if pair else ():
            if name.startswith(a):
                twin = b + name.removeprefix(a)
                return twin if twin in arrays and arrays[twin].shape == arrays[name].shape else name
        return name

    return {name: arrays[other(name)] for name in arrays}


def _two_norms(config: Config) -> tuple[str, ...]:
    """The first two in the order of the contract."""
    norms = [name.removesuffix("weight") for name in config.params() if name.endswith("norm.weight")]
    return tuple(norms[:2]) if len(norms) > 1 else ()


def _other_layer(config: Config) -> tuple[str, ...]:
    return "layers.0.", "layers.1."
