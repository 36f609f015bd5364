"""Plain values from outside: bounded JSON, and values that fit a type. Nothing read here can name code, and nothing large is built."""

from __future__ import annotations

import dataclasses
import json
import numbers
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from unisono_spec.contract.errors import InputError, nearest, shown

MAX_BYTES = 1 << 20  # of one document
MAX_DEPTH = 16  # of lists and mappings within each other
MAX_INTEGER = 2**63 - 1

T = TypeVar("T")


def read_json(data: bytes | str, source: str, remedy: str, limit: int = MAX_BYTES, constants: bool = False) -> Any:
    """The value of one JSON document, no larger or deeper than our own writers make them.

    limit: most bytes. constants: accept NaN and ±Infinity, which logs of a diverged run hold. Raises InputError, which names `source`,
    on anything that is not JSON, on names given twice, and past the bounds of this module.
    """
    if len(data) > limit:
        raise InputError(f"{source}: {len(data)} bytes of JSON, at most {limit} are read; {remedy}")
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=float if constants else _constant)
    except RecursionError as error:
        raise InputError(f"{source}: nested more than {MAX_DEPTH} deep; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{source}: not JSON that is read here ({error}); {remedy}") from error
    check_plain(value, source, remedy)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shown(twice)} is given twice")
    return found


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def check_plain(value: Any, source: str, remedy: str, depth: int = 0) -> None:
    """Raise InputError unless `value` is made of bounded JSON values alone."""
    if depth > MAX_DEPTH:
        raise InputError(f"{source}: nested more than {MAX_DEPTH} deep; {remedy}")
    if isinstance(value, dict):
        for name, part in value.items():
            if not isinstance(name, str):
                raise InputError(f"{source}: {shown(name)} is a {type(name).__name__} where a name should be; {remedy}")
            check_plain(name, source, remedy, depth + 1)
            check_plain(part, f"{source}: {shown(name)}" if depth == 0 else source, remedy, depth + 1)
    elif isinstance(value, list):
        for part in value:
            check_plain(part, source, remedy, depth + 1)
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise InputError(f"{source}: an integer of {value.bit_length()} bits; {remedy}")
    elif isinstance(value, str) and not value.isprintable() and "\0" in value:
        raise InputError(f"{source}: {shown(value)} holds a NUL character; {remedy}")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise InputError(f"{source}: {shown(value)} is a {type(value).__name__}, not plain text, number, list or mapping; {remedy}")


def typed(value: Any, hint: Any, name: str) -> Any:
    """`value` where it fits `hint`: a plain type, Literal, `T | None`, lists and tuples of one, a dict of plain values, a dataclass.

    Integers pass as floats, lists as tuples; nothing else is converted. Raises InputError otherwise.
    """
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, name)
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        if not isinstance(value, str) or value not in options:
            raise InputError(f"{name}: {shown(value)} is not valid; {nearest(shown(value).strip(chr(39)), map(str, options))}")
        return value
    if origin in (Union, types.UnionType):
        for option in options:
            if _fits(value, option):
                return typed(value, option, name)
    elif _fits(value, hint):
        if hint is float:
            return float(value)
        if origin is tuple:
            return tuple(value)
        if origin is dict and options[1] is not Any:
            return {key: typed(part, options[1], f"{name}.{key}") for key, part in value.items()}
        if origin is dict:
            for key, part in value.items():
                _check_field(part, f"{name}.{key}")
            return dict(value)
        return value
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise InputError(f"{name}: {shown(value)} is too large; use a number up to {MAX_INTEGER}")
    raise InputError(f"{name}: {shown(value)} has type {type(value).__name__}; give {expected(hint)}")


def expected(hint: Any) -> str:
    """What a value of this type is, in words."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"{'one of ' * (len(options) > 1)}{', '.join(map(str, options))}"
    if origin in (Union, types.UnionType):
        return " or ".join(expected(option) for option in options)
    if origin in (list, tuple):
        return f"a list of {'integers' if options[0] is int else 'texts'}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "names with values"
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}
    return words.get(hint, str(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(part, get_args(hint)[0]) for part in value)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (Mapping, hint))  # pyright: ignore[reportArgumentType]
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INTEGER:
        return False
    return isinstance(value, (int, float)) if hint is float else isinstance(value, hint)


def _check_field(value: Any, name: str) -> None:
    """What a field of a model's config can be; its own type is checked where the config is made."""
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) or (type(part) in (int, float)) for part in value):
        return
    if value is None or not isinstance(value, (bool, int, float, str)):
        raise InputError(
            f"{name}: {shown(value)} has type {type(value).__name__}; give a number, a text, true or false, or a list of texts or numbers"
        )


def build(cls: type[T], values: Any, name: str) -> T:
    """The dataclass `cls` from names and values as JSON and YAML give them; what is missing keeps its default."""
    if not isinstance(values, Mapping):
        raise InputError(f"{name}: {shown(values)} has type {type(values).__name__}; give names with values")
    hints, prefix = get_type_hints(cls), f"{name}." if name else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            raise InputError(f"{prefix}{key}: no such field; {nearest(key, fields)}")
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{prefix}{key}: missing; give {expected(hints[key])}")
    return cls(**{key: typed(value, hints[key], f"{prefix}{key}") for key, value in values.items()})


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise InputError unless `value` is an integer from `least` to `most`. (A traced size is one too.)"""
    whole = isinstance(value, int) or type(value).__name__ == "SymInt" or isinstance(value, numbers.Integral)
    if not whole or isinstance(value, bool):
        raise InputError(f"{name}: {shown(value)} has type {type(value).__name__}; give an integer")
    if value < least or (most is not None and value > most):  # pyright: ignore[reportOperatorIssue]
        upper = "" if most is None else f" and ≤ {most}"
        raise InputError(f"{name}: {shown(value)}; use an integer ≥ {least}{upper}")


def check_number(name: str, value: object, most: float) -> None:
    """Raise InputError unless `value` is a number above 0, up to `most`: a float that PyTorch traces, a SymFloat, is one too."""
    real = isinstance(value, (int, float)) or type(value).__name__ == "SymFloat" or isinstance(value, numbers.Real)
    if not real or isinstance(value, bool):
        raise InputError(f"{name}: {shown(value)} has type {type(value).__name__}; give a number")
    if not 0 < value <= most:  # pyright: ignore[reportOperatorIssue]
        raise InputError(f"{name}: {shown(value)}; use a number above 0, at most {most:g}")


def expanded(name: str | Path) -> Path:
    """The path that a user wrote, with ~ and ~user written out; a user who is not known here leaves it as it is."""
    try:
        return Path(name).expanduser()
    except (RuntimeError, ValueError):
        return Path(name)


def is_file(path: Path) -> bool:
    """Whether there is such a file; names that no file can have are names of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Likewise of a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_file(path: Path, remedy: str, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a small regular file; InputError where it is not one, is longer than `limit`, or cannot be read."""
    if not is_file(path):
        raise InputError(f"{path}: no such file; {remedy}")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if len(data) > limit:
        raise InputError(f"{path}: longer than {limit} bytes; {remedy}")
    return data
