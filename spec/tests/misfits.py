"""Arrays of an op that do not fit each other, for every room: each is an InputError; and what one argument says for all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.shapes import SHAPES

SIZES = {"B": 2, "T": 5, "H": 2, "K": 3, "V": 4, "M": 3, "D": 3, "N": 2, "w": 3, "P": 2, "capacity": 7, "n": 3, "L": 2, "d_m": 4}
OTHERS = {"decayed_sum": {"decay": 0.5}, "mom_gru": {"p": {}}}  # arguments that are no arrays
Array = Callable[[np.ndarray], Any]


def check(op: Any, array: Array) -> int:
    """Raises where a form of `op`, a module of a room, takes what does not fit; how many calls were refused."""
    name, refused = op.__name__.rpartition(".")[2], 0
    for form in (op.recurrent, op.hoisted if name == "mom_gru" else op.parallel):
        for where, given in _misfits(name):
            arrays = {n: tuple(map(array, a)) if isinstance(a, tuple) else array(a) for n, a in given.items()}
            assert "; cut or expand it" in _refusal(form, {**arrays, **OTHERS.get(name, {})}), f"{name}.{form.__name__} took {where}"
            refused += 1
    return refused


def one_for_all(form: Any, array: Array, *axes: int) -> tuple[Any, Any]:
    """What a form of multiscale makes of decays and weights [B, T, …] that all along `axes` share, and of their copies for each."""
    full = _fitting("multiscale", np.random.default_rng(0))
    del full["reset"], full["valid"]  # a mark for each token makes copies
    short, whole = dict(full), dict(full)
    for name in ("log_decay", "weight"):
        for axis in axes:
            short[name] = short[name].take([0], axis)
        whole[name] = np.array(np.broadcast_to(short[name], full[name].shape))
    found, true = (
        form(**{n: tuple(map(array, a)) if isinstance(a, tuple) else array(a) for n, a in given.items()}) for given in (short, whole)
    )
    return [found[0], *found[1]], [true[0], *true[1]]


def _refusal(form: Any, given: dict[str, Any]) -> str:
    try:
        form(**given)
    except InputError as error:
        return str(error)
    return ""


def _misfits(op: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where an axis is of another length than others that its letter names: 1, where that is not allowed, or one more; or is missing."""
    words = [w for axes in SHAPES[op].values() for part in (axes if isinstance(axes, tuple) else (axes,)) for w in part.split()]
    letters = [_letter(word) for word in words]
    for name, axes in SHAPES[op].items():
        for i, part in enumerate(axes if isinstance(axes, tuple) else (axes,)):
            for axis, word in enumerate(part.split()):
                if letters.count(_letter(word)) == 1 and not word.isdigit():
                    continue  # nothing else says how long it is
                for change in (lambda a, axis=axis: np.concatenate([a, a.take([0], axis)], axis), lambda a, axis=axis: a.take([0], axis)):
                    given = _fitting(op, np.random.default_rng(0))
                    old = given[name][i] if isinstance(axes, tuple) else given[name]
                    new = change(old)
                    if new.shape == old.shape or (new.shape[axis] == 1 and word.startswith("1|")):
                        continue
                    given[name] = (*given[name][:i], new, *given[name][i + 1 :]) if isinstance(axes, tuple) else new
                    yield f"{name}[{i}] of shape {new.shape}", given
    first = next(iter(SHAPES[op]))
    given = _fitting(op, np.random.default_rng(0))
    yield f"{first} without an axis", {**given, first: given[first][0]}


def _letter(word: str) -> str:
    return word.removeprefix("1|").removesuffix("-1")


def _fitting(op: str, made: np.random.Generator) -> dict[str, Any]:
    def draw(name: str, words: str) -> np.ndarray:
        letters = [word.removeprefix("1|") for word in words.split()]
        shape = [int(n) if n.isdigit() else SIZES[n.removesuffix("-1")] - n.endswith("-1") for n in letters]
        if name in ("reset", "valid"):
            return made.random(shape) < 0.8
        if words == "B":
            return np.full(shape, 2, np.int32)
        return -made.random(shape) if name == "log_decay" else 0.1 + made.random(shape)

    return {n: tuple(draw(n, part) for part in a) if isinstance(a, tuple) else draw(n, a) for n, a in SHAPES[op].items()}
