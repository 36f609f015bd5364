"""Arrays of an op that do not fit each other, for every room: each is an InputError; and what one argument says for all tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.shapes import BOOLEAN, Axes, arguments, size, terms

SIZES = {"B": 2, "T": 5, "H": 2, "K": 3, "V": 4, "M": 3, "D": 3, "N": 2, "w": 3, "P": 2, "capacity": 7, "n": 3, "L": 2, "d_m": 4, "R": 5}
OTHERS = {"decayed_sum": {"decay": 0.5}}  # arguments that are no arrays
Array = Callable[[np.ndarray], Any]


def check(op: Any, array: Array, steps: bool = False) -> int:
    """Raises where a form of `op`, a module of a room, takes what does not fit; how many calls were refused. steps: its step, too."""
    name, refused = op.__name__.rpartition(".")[2], 0
    for form in (op.recurrent, op.hoisted if name == "mom_gru" else op.parallel, *([op.step] if steps else [])):
        for where, given in _misfits(name, form):
            arrays = {n: _each(lambda _, a: array(a), a) for n, a in given.items()}
            assert "here [" in _refusal(form, {**arrays, **OTHERS.get(name, {})}), f"{name}.{form.__name__} took {where}"
            refused += 1
    chunked = op.hoisted if name == "mom_gru" else op.parallel
    known = {n: axes for n, axes in arguments(name).items() if n in inspect.signature(chunked).parameters}
    given = {n: _each(lambda _, a: array(a), a) for n, a in _fitting(known, np.random.default_rng(0)).items()}
    for chunk in (0, -1, 2.5, True, "8", None, 2**31):
        said = _refusal(chunked, {**given, **OTHERS.get(name, {}), "chunk_size": chunk})
        assert re.match(rf"chunk_size: '?{chunk}'?.* an integer", said), f"{name} took chunks of {chunk!r}: {said}"
    for number in {"decay", "temperature"}.intersection(inspect.signature(chunked).parameters):
        for bad in (0, -1.0, np.nan, np.inf, None, True, "1", [1.0], 1j):
            for form in (op.recurrent, chunked):
                assert re.match(rf"{number}: .* number", _refusal(form, {**given, number: bad})), f"{name} took {number}={bad!r}"
    return refused


def check_none(op: Any, array: Array) -> None:
    """Raises where a form of `op`, a module of a room, takes arrays of no tokens, no heads or no width."""
    name = op.__name__.rpartition(".")[2]
    for form in (op.recurrent, op.hoisted if name == "mom_gru" else op.parallel):
        known = {n: axes for n, axes in arguments(name).items() if n in inspect.signature(form).parameters}
        for letter in {letter for axes in known.values() for _, words in _parts(axes) for letter in _letters(words)} - {"B"}:
            given = _fitting(known, np.random.default_rng(0), {**SIZES, letter: 0})
            arrays = {n: _each(lambda _, a: array(a), a) for n, a in given.items()}
            assert f"{letter} is 0; give at least one" in _refusal(form, {**arrays, **OTHERS.get(name, {})}), (
                f"{form.__name__} took {letter}"
            )


def one_for_all(form: Any, array: Array, *axes: int) -> tuple[Any, Any]:
    """What a form of multiscale makes of decays and weights [B, T, …] that all along `axes` share, and of their copies for each."""
    full = _fitting(arguments("multiscale"), np.random.default_rng(0))
    del full["reset"], full["valid"], full["compress"]  # a mark for each token makes copies
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


def _misfits(op: str, form: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where an axis is of another length than others that its letter names: 1, where that is not allowed, or one more; or is missing.
    Marks that are numbers."""
    known = {n: axes for n, axes in arguments(op, form.__name__ == "step").items() if n in inspect.signature(form).parameters}
    parts = [(name, key, words) for name, axes in known.items() for key, words in _parts(axes)]
    letters = [letter for *_, words in parts for word in words.split() for letter in _letters(word)]
    for name, key, words in parts:

        def other(change: Array, name: str = name, key: Any = key) -> dict[str, Any]:
            given = _fitting(known, np.random.default_rng(0))
            given[name] = _each(lambda k, a: change(a) if k == key else a, given[name])
            return given

        for axis, word in enumerate(words.split()):
            if [letters.count(letter) for letter in _letters(word)] == [1] and word == _letters(word)[0]:
                continue  # nothing else says how long it is
            yield f"{name}[{key}] longer in {word}", other(lambda a, axis=axis: np.concatenate([a, a.take([0], axis)], axis))
            if word != "1" and not word.startswith("1|"):
                yield f"{name}[{key}] of length 1 in {word}", other(lambda a, axis=axis: a.take([0], axis))
        if name in BOOLEAN:
            yield f"{name} of numbers", other(lambda a: a.astype(np.int32))
    first = next(iter(known))
    given = _fitting(known, np.random.default_rng(0))
    yield f"{first} without an axis", {**given, first: given[first][0]}


def _letters(word: str) -> list[str]:
    return re.findall("[A-Za-z_]+", word)


def _parts(axes: Axes) -> list[tuple[Any, str]]:
    return [(None, axes)] if isinstance(axes, str) else list(axes.items() if isinstance(axes, dict) else enumerate(axes))


def _each(change: Callable[[Any, Any], Any], value: Any) -> Any:
    """`change` of an argument, or of its parts by their keys."""
    if isinstance(value, dict):
        return {key: change(key, a) for key, a in value.items()}
    return tuple(change(i, a) for i, a in enumerate(value)) if isinstance(value, tuple) else change(None, value)


def _fitting(known: dict[str, Axes], made: np.random.Generator, sizes: dict[str, int] = SIZES) -> dict[str, Any]:
    def draw(name: str, words: str) -> np.ndarray:
        shape = [max(0, size(terms(word), sizes)) for word in words.split()]
        if name in BOOLEAN:
            return made.random(shape) < 0.8
        if words == "B":
            return np.full(shape, 2, np.int32)
        return -made.random(shape) if name == "log_decay" else 0.1 + made.random(shape)

    return {name: _each(lambda _, words, name=name: draw(name, words), axes) for name, axes in known.items()}
