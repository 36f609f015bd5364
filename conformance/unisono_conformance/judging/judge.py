"""The court's budgets for comparisons that no property makes: a room's own tests hold what they computed to the spec by these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, Config, state_dtype

from unisono_conformance.cases import case
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.judging import numerics, truth


class Disagreement(AssertionError):
    """What was computed is not what was asked for."""


def within(found: Any, true: Any, budget: Any, what: str = "", where: np.ndarray | None = None) -> float:
    """The worst share of the budget that an element takes; Disagreement above 1. `where` [B, T] picks the tokens that count."""
    found, true = np.asarray(found), np.asarray(true)
    if found.shape != true.shape:
        raise Disagreement(f"{what} has shape {found.shape}, expected {true.shape}")
    ratio = numerics.share(found, true, np.asarray(budget))
    if where is not None:
        ratio = np.where(where.reshape(where.shape + (1,) * (ratio.ndim - 2)), ratio, 0)
    if not ratio.size:
        return 0.0
    if not ratio.max() <= 1:
        at = tuple(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
        limit, bad = np.broadcast_to(np.asarray(budget), true.shape)[at], int((ratio > 1).sum())
        raise Disagreement(
            f"{what} at {list(at)} is {float(found[at]):.9g}, not {float(true[at]):.9g}: off by {ratio.max():.3g} times the "
            f"budget of {float(limit):.3g}; {bad} of {ratio.size} elements are out"
        )
    return float(ratio.max())


def model(config: Config, params: Arrays, given: Mapping[str, Any], found: tuple[Any, Mapping[str, Any]], dtype: str = "float32") -> float:
    """Hold logits (of valid tokens) and the final state to the spec's, on the same parameters and inputs; the worst share.

    given: tokens, reset and valid [B, T], and each array of the state before them, as a graph's inputs are called.
    """
    held, state = case(config.arch), {name: np.asarray(given[name]) for name in config.states()}
    inputs = Inputs({"tokens": np.asarray(given["tokens"])}, state, given.get("reset"), given.get("valid"), params)
    (logits, budget), last = truth.expected(held, config, inputs, dtype)
    if set(found[1]) != set(last):
        raise Disagreement(f"the state has the names {sorted(found[1])}, expected {sorted(last)}")
    worst = within(_of(found[0], DTYPES[dtype], "logits"), logits, budget, "logits", inputs.valid)
    for name, (true, limit) in last.items():
        kind = np.int32 if true.dtype.kind == "i" else DTYPES[state_dtype(dtype)]
        worst = max(worst, within(_of(found[1][name], kind, name), true, limit, f"final state {name}"))
    return worst


def _of(found: Any, dtype: Any, what: str) -> np.ndarray:
    found = np.asarray(found)
    if found.dtype != dtype:
        raise Disagreement(f"{what} is {found.dtype}, not {np.dtype(dtype)}")
    return found


def same(found: Any, true: Any, limit: float | None = None, what: str = "") -> float:
    """Every array of `found` is its twin in `true`: integers exactly, floats up to `limit` (default: what two forms of a small model in
    float64 may differ by) of the largest value, or of 1 where that is smaller. Arrays may be nested in tuples, lists and dicts."""
    worst = 0.0
    for (name, a), (twin, b) in zip(_leaves(found, what), _leaves(true, what), strict=True):
        if name != twin:
            raise Disagreement(f"{name} stands where {twin} is expected")
        if a.dtype.kind != b.dtype.kind:
            raise Disagreement(f"{name} is {a.dtype}, expected {b.dtype}")
        exact = b.dtype.kind in "iub"
        scale = 0.0 if exact or not b.size else max(1.0, float(np.abs(b).max()))
        worst = max(worst, within(a, b, (numerics.forms() if limit is None else limit) * scale, name))
    return worst


def differ(a: Any, b: Any) -> bool:
    """Whether two arrays are of different functions: by more than any order of roundings explains."""
    try:
        same(a, b, numerics.mistake())
    except Disagreement:
        return True
    return False


def _leaves(x: Any, name: str) -> list[tuple[str, np.ndarray]]:
    if x is None:
        return []
    if isinstance(x, Mapping):
        return [leaf for key in sorted(x) for leaf in _leaves(x[key], f"{name} {key}".strip())]
    if isinstance(x, (tuple, list)):
        return [leaf for i, part in enumerate(x) for leaf in _leaves(part, f"{name} {i}".strip())]
    return [(name, np.asarray(x.detach() if hasattr(x, "detach") else x))]
