"""What an op's arrays measure, once for every room: one that does not fit is an InputError, where a framework would pad or repeat it."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from unisono_spec.contract.base import MAX_SIZE
from unisono_spec.contract.checks import dtype_kind
from unisono_spec.contract.errors import InputError, shown
from unisono_spec.contract.ordinary import check_ordinary
from unisono_spec.contract.plain import check_integer, check_number

Form = TypeVar("Form", bound=Callable[..., Any])
_ATTENTION = {"q": "B T H K", "k": "B T H K", "v": "B T H V"}
_MARKS = {"reset": "B T", "valid": "B T"}
BOOLEAN = (*_MARKS, "compress")
_CELL = {
    "memory": "n L d_m", "router.1.weight": "n R", "router.1.bias": "n", "router.0.weight": "R 2D", "router.0.bias": "R",
    "query.weight": "d_m 2D", "query.bias": "d_m", "input.weight": "3D D+d_m", "input.bias": "3D", "hidden.weight": "3D D",
    "key.weight": "d_m D", "key.bias": "d_m", "value.weight": "d_m D", "value.bias": "d_m", "erase.weight": "d_m D", "erase.bias": "d_m",
    "gate.weight": "1 D", "gate.bias": "1", "balance_bias": "n",
}  # fmt: skip
MOST = {"decay": 1.0, "temperature": sys.float_info.max}  # arguments that are numbers above 0
Axes = str | tuple[str, ...] | dict[str, str]
Terms = tuple[tuple[int, str], ...]
Parts = tuple[tuple[Any, str, tuple[tuple[str, Terms], ...]], ...]
# By op, axes of its arguments: a letter is one number in all of them, 1|T that or 1, w-1 one less. Of tuples and mappings, one a part.
SHAPES: dict[str, dict[str, Axes]] = {
    "decayed_sum": {"x": "B T D", "initial_state": "B D"},
    "weighted_sum": {"x": "B T D", "s": "B T", "initial_state": "B D"},
    "linear_attention": {**_ATTENTION, "initial_state": ("B H K V", "B H K")},
    "multiscale": {
        **_ATTENTION,
        "q_norm": "B T H K",
        "k_norm": "B T H K",
        "log_decay": "1|B 1|T M",
        "weight": "1|B 1|T M 1|H 1|V",
        "initial_state": ("B M H K V", "B M H K"),
        "compress": "B T",
    },
    "selective_scan": {"u": "B T D", "dt": "B T D", "A": "D N", "B": "B T N", "C": "B T N", "D": "D", "initial_state": "B D N"},
    "short_conv": {"x": "B T D", "weight": "D 1 w", "bias": "D", "initial_state": "B w-1 D"},
    "diagonal_ssm": {"u": "B T D", "dt": "D", "A": "D P 2", "C": "D P 2", "D": "D", "initial_state": "B D P 2"},
    "window": {**_ATTENTION, "initial_state": ("B w H K", "B w H V", "B")},
    "softmax_attention": {**_ATTENTION, "initial_state": ("B capacity H K", "B capacity H V", "B")},
    "mom_gru": {"x": "B T D", "initial_state": ("B D", "B n L d_m"), "noise": "B T n", "p": _CELL},
}
SHAPES = {op: {**axes, **_MARKS} for op, axes in SHAPES.items()}


def shaped(form: Form) -> Form:
    """An op's form, named as its module, whose arrays are held to SHAPES before it runs; those of `step` have no T."""
    op, one, names = form.__module__.rpartition(".")[2], form.__name__ == "step", tuple(inspect.signature(form).parameters)
    bounded = tuple((name, MOST[name]) for name in names if name in MOST)
    known = tuple(map(_read, *zip(*arguments(op, one).items(), strict=True)))  # here: PyTorch's compiler would trace it at every call

    @functools.wraps(form)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        _check_all(known, given)
        if "chunk_size" in given:
            check_integer("chunk_size", given["chunk_size"], 1, MAX_SIZE)
        for name, most in bounded:
            # an array's number may be traced, and of a number PyTorch's compiler can't ask whether it has a shape
            if name in given and (isinstance(given[name], (int, float)) or not hasattr(given[name], "shape")):
                check_number(name, given[name], most)
        return form(*args, **kwargs)

    return cast(Form, call)


def arguments(op: str, one: bool = False) -> dict[str, Axes]:
    """Of SHAPES, with the names that a form has, or `step`."""
    if not one:
        return SHAPES[op]

    def without_time(words: str) -> str:
        return " ".join(word for word in words.split() if word.removeprefix("1|") != "T")

    found: dict[str, Axes] = {}
    for name, axes in SHAPES[op].items():
        whole = isinstance(axes, dict) or name == "initial_state"
        found["state" if name == "initial_state" else name] = axes if whole else without_time(axes)  # pyright: ignore[reportArgumentType]
    return found


def terms(word: str) -> Terms:
    """Numbers and the letters that they multiply, none where they stand alone: D-2 is (1, D), (-2, ·)."""
    found = re.findall(r"([+-]?)(\d*)([A-Za-z_]*)", word.removeprefix("1|"))
    return tuple((int(f"{sign}{number or 1}"), letter) for sign, number, letter in found if number or letter)


def size(sum_of: Terms, sizes: Mapping[str, Any]) -> Any:
    """What terms come to; None where nothing has said yet what one of their letters stands for."""
    total: Any = 0
    for number, letter in sum_of:
        if letter and letter not in sizes:
            return None
        total = total + number * (sizes[letter] if letter else 1)
    return total


def _read(name: str, axes: Axes) -> tuple[str, int, Parts]:
    """An argument's name, of how many arrays a tuple is, and each one's key, label and axes."""
    parts: Any = {None: axes} if isinstance(axes, str) else axes if isinstance(axes, dict) else dict(enumerate(axes))
    labelled = ((key, name if key is None else f"{name}[{key}]", words.split()) for key, words in parts.items())
    return (
        name,
        len(axes) if isinstance(axes, tuple) else 0,
        tuple((key, label, tuple((word, terms(word)) for word in words)) for key, label, words in labelled),
    )


def _check_all(known: tuple[tuple[str, int, Parts], ...], given: Mapping[str, Any]) -> None:
    """Raise InputError where an array of `given`, an op's arguments by name, does not fit those before it; a None is left out."""
    sizes: dict[str, Any] = {}
    for name, number, parts in known:
        value = given.get(name)
        if value is None:
            continue
        if number and (not isinstance(value, (tuple, list)) or len(value) != number):
            found = f"{len(value)} arrays" if isinstance(value, (tuple, list)) else f"of type {type(value).__name__}"
            raise InputError(f"{name}: {found}, expected {number} arrays; give what init_state or a call before returned")
        for key, label, axes in parts:
            if key is None:
                _check(label, value, axes, sizes)
            elif number or key in value:
                _check(label, value[key], axes, sizes)


def _check(name: str, array: Any, axes: tuple[tuple[str, Terms], ...], sizes: dict[str, Any]) -> None:
    """Holds an array's shape to `sizes`, which learn what letters stand for, of which only B may be 0; and marks to booleans."""
    if not hasattr(array, "shape"):
        words = ", ".join(word for word, _ in axes)
        raise InputError(f"{name}: {shown(array)} has type {type(array).__name__}; give an array [{words}]")
    check_ordinary(name, array)
    wanted = [size(sum_of, sizes) for _, sum_of in axes]
    fits = len(array.shape) == len(axes)
    for (word, _), n, known in zip(axes, array.shape, wanted, strict=False):
        if known is None:
            if word != "B" and n == 0:
                raise InputError(f"{name}: {word} is 0; give at least one{' token' if word == 'T' else ''}")
            sizes[word] = n
        elif n != known and not (n == 1 and word.startswith("1|")):
            fits = False
    if not fits:
        words = ", ".join(word for word, _ in axes)
        here = ", ".join(
            word if known is None else f"1 or {known}" if "|" in word else str(known) for (word, _), known in zip(axes, wanted, strict=True)
        )
        raise InputError(f"{name}: shape {tuple(array.shape)}, expected [{words}], here [{here}]; cut or expand it")
    if name in BOOLEAN and dtype_kind(array) != "b":
        raise InputError(f"{name}: dtype {array.dtype}, expected booleans, here [{', '.join(map(str, array.shape))}]; give {name} != 0")
