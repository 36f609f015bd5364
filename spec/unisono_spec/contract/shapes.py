"""What an op's arrays measure, once for every room: one that does not fit is an InputError, where a framework would pad or repeat it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from unisono_spec.contract.errors import InputError

Form = TypeVar("Form", bound=Callable[..., Any])
_ATTENTION = {"q": "B T H K", "k": "B T H K", "v": "B T H V"}
_MARKS = {"reset": "B T", "valid": "B T"}
# By op, axes of its arguments: a letter is one number in all of them, 1|T that or 1, w-1 one less. Of a tuple, one for each part.
SHAPES: dict[str, dict[str, str | tuple[str, ...]]] = {
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
    },
    "selective_scan": {"u": "B T D", "dt": "B T D", "A": "D N", "B": "B T N", "C": "B T N", "D": "D", "initial_state": "B D N"},
    "short_conv": {"x": "B T D", "weight": "D 1 w", "bias": "D", "initial_state": "B w-1 D"},
    "diagonal_ssm": {"u": "B T D", "dt": "D", "A": "D P 2", "C": "D P 2", "D": "D", "initial_state": "B D P 2"},
    "window": {**_ATTENTION, "initial_state": ("B w H K", "B w H V", "B")},
    "softmax_attention": {**_ATTENTION, "initial_state": ("B capacity H K", "B capacity H V", "B")},
    "mom_gru": {"x": "B T D", "initial_state": ("B D", "B n L d_m"), "noise": "B T n"},
}
SHAPES = {op: {**axes, **_MARKS} for op, axes in SHAPES.items()}


def shaped(form: Form) -> Form:
    """An op's form, named as its module, whose arrays are held to SHAPES before it runs."""
    op, names = form.__module__.rpartition(".")[2], tuple(inspect.signature(form).parameters)

    @functools.wraps(form)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_shapes(op, {**dict(zip(names, args, strict=False)), **kwargs})
        return form(*args, **kwargs)

    return cast(Form, call)


def check_shapes(op: str, given: Mapping[str, Any]) -> None:
    """Raise InputError where an array of `given`, an op's arguments by name, does not fit those before it; a None is left out."""
    sizes: dict[str, Any] = {}
    for name, axes in SHAPES[op].items():
        if given.get(name) is None:
            continue
        if isinstance(axes, str):
            _check(name, given[name].shape, axes.split(), sizes)
            continue
        for i, (part, words) in enumerate(zip(given[name], axes, strict=True)):
            _check(f"{name}[{i}]", part.shape, words.split(), sizes)


def _check(name: str, shape: tuple[Any, ...], words: list[str], sizes: dict[str, Any]) -> None:
    """Holds a shape to `sizes`, which learn what letters stand for."""
    wanted = [_size(word, sizes) for word in words]
    fits = len(shape) == len(words)
    for word, n, size in zip(words, shape, wanted, strict=False):
        if size is None:
            sizes[word] = n
        elif n != size and not (n == 1 and word.startswith("1|")):
            fits = False
    if not fits:
        here = ", ".join(
            word if size is None else f"1 or {size}" if "|" in word else str(size) for word, size in zip(words, wanted, strict=True)
        )
        raise InputError(f"{name}: shape {tuple(shape)}, expected [{', '.join(words)}], here [{here}]; cut or expand it")


def _size(word: str, sizes: Mapping[str, Any]) -> Any:
    """What a word of SHAPES stands for; None where nothing has said it yet."""
    letter = word.removeprefix("1|")
    if letter.isdigit():
        return int(letter)
    return sizes[letter[:-2]] - 1 if letter.endswith("-1") else sizes.get(letter)
