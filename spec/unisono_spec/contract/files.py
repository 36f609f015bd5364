"""Parameters and states as safetensors files: one file loads in every room with no conversion.

Metadata: `format` ("unisono"), `version`, `kind` ("params", "state", …), and `config` as JSON. Never pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from unisono_spec.contract import config_from_dict, config_to_dict
from unisono_spec.contract.aside import written
from unisono_spec.contract.base import ANY, DTYPES, Arrays, Config, state_dtype
from unisono_spec.contract.errors import InputError, nearest, shown
from unisono_spec.contract.memory import check_fits
from unisono_spec.contract.ordinary import check_ordinary
from unisono_spec.contract.plain import build, is_file, is_folder, read_json

VERSION = "1"
MAX_HEADER = 1 << 25  # bytes; the largest config's names take a fifth of it
MAX_POSITION = 2**31 - 1  # positions are int32
FLOATS = tuple(DTYPES)
WIDE, _COMPLEX = ("float64", "float32"), ("complex128", "complex64")  # of states; of the complex step
# what a file may hold: parameters, moments and states; the rest of safetensors' types belongs to other programs
_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32"}


@dataclasses.dataclass(frozen=True)
class Declared:
    """One array as a file's header declares it."""

    shape: tuple[int, ...]
    dtype: str


Check = Callable[[Config, Mapping[str, Declared]], None]


def save_params(path: str | Path, config: Config, params: Mapping[str, np.ndarray]) -> None:
    """Write a model file, whole or not at all."""
    check_params(config, params, str(path))
    check_finite(params, str(path))
    save_arrays(path, params, config, "params")


def load_params(path: str | Path) -> tuple[Config, Arrays]:
    """Read a model file written by any room."""
    config, arrays = load_arrays(path, "params", lambda config, declared: check_params(config, declared, str(path)))
    check_finite(arrays, str(path))
    return config, arrays


def save_state(path: str | Path, config: Config, state: Mapping[str, np.ndarray], more: Mapping[str, str] | None = None) -> None:
    """Write a running state, so that another process or framework can continue from it. more: further metadata."""
    check_state(config, state, source=str(path))
    check_finite(state, str(path))
    save_arrays(path, state, config, "state", more)


def load_state(path: str | Path) -> tuple[Config, Arrays]:
    """Read a running state and the config of the model that it belongs to."""
    config, arrays = load_arrays(path, "state", lambda config, declared: check_state(config, declared, source=str(path)))
    check_finite(arrays, str(path))
    check_positions(arrays, source=str(path))
    return config, arrays


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all: a full disk or a kill leaves the old file."""
    with written(path) as file:
        file.write(data)


def check_params(config: Config, params: Mapping[str, Any], source: str = "params", array: Any = None, complex_step: bool = False) -> None:
    """Raise InputError unless `params` has exactly the names, shapes and dtypes that `config` declares.

    array: what arrays must be; anything with `.shape` and `.dtype` unless told. complex_step: complex numbers may stand for floats.
    """
    expected = {name: p.shape for name, p in config.params().items()}
    _check_names(params, expected, source, config.arch)
    for name, shape in expected.items():
        found, dtype = _described(params[name], f"{source}: {name}", array)
        if found != shape:
            raise InputError(f"{source}: {name} has shape {found}, its config says {shape}; use the file's own config")
        if dtype not in FLOATS and not (complex_step and dtype in _COMPLEX):
            raise InputError(f"{source}: {name} has dtype {dtype}; parameters are one of {', '.join(FLOATS)}: convert them")


def check_state(
    config: Config, state: Mapping[str, Any], batch: int | None = None, source: str = "state", complex_step: bool = False
) -> None:
    """Raise InputError unless `state` has the names, shapes and dtypes that `config` declares."""
    expected = config.states()
    _check_names(state, expected, source, config.arch)
    found = {name: _described(state[name], f"{source}: {name}") for name in expected}
    capacities = {found[name][0][1] for name, s in expected.items() if ANY in s.shape and len(found[name][0]) > 1}
    if len(capacities) > 1:
        raise InputError(f"{source}: caches of {sorted(capacities)} tokens in one state; start from init_state(batch, capacity)")
    if capacities:
        expected = config.states(capacities.pop())
    for name, spec in expected.items():
        shape, dtype = found[name]
        if batch is None and shape:
            batch = shape[0]
        if shape != (batch, *spec.shape):
            raise InputError(f"{source}: {name} has shape {shape}, expected {(batch, *spec.shape)}; start from init_state(batch)")
        fits = dtype in ("int32", "int64") if spec.integer else dtype in WIDE or (complex_step and dtype in _COMPLEX)
        if not fits:
            wanted = "int32" if spec.integer else "float32 or wider"
            raise InputError(f"{source}: {name} has dtype {dtype}, expected {wanted}; start from init_state(batch)")


def check_finite(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raise InputError where a number is NaN or infinite: no run of ours writes such, and it would spread in silence."""
    for name, array in ((n, np.asarray(a)) for n, a in arrays.items()):  # torch's dtypes tell no kind
        if array.dtype.kind != "i" and not np.isfinite(array).all():
            raise InputError(
                f"{source}: {name} holds NaN or infinite numbers, which no room reads; it is damaged, restore it or use an older one"
            )


def check_positions(state: Mapping[str, np.ndarray], length: int = 0, source: str = "state") -> None:
    """Raise InputError where a position is negative, or leaves int32 within the next `length` tokens."""
    for name, array in state.items():
        if array.dtype.kind == "i" and array.size and not (array.min() >= 0 and int(array.max()) + length <= MAX_POSITION):
            bad = int(array.min()) if array.min() < 0 else int(array.max())
            raise InputError(f"{source}: {name} is {bad}; positions are 0 to {MAX_POSITION - length} here: reset, or start from init_state")


def _described(given: Any, name: str, array: Any = None) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an array, of any framework unless told."""
    if not hasattr(given, "shape") or not hasattr(given, "dtype") or (array is not None and not isinstance(given, array)):
        raise InputError(f"{name} is {shown(given)}, a {type(given).__module__}.{type(given).__name__}; give a NumPy array")
    check_ordinary(name, given)
    return tuple(given.shape), str(given.dtype).removeprefix("torch.")


def _check_names(found: Mapping[str, object], expected: Mapping[str, object], source: str, arch: str) -> None:
    if not isinstance(found, Mapping):
        raise InputError(f"{source}: {shown(found)} has type {type(found).__name__}; give arrays by name, a dict")
    for name in found:
        if name not in expected:
            raise InputError(f"{source}: {shown(name)} does not belong to this {arch} config; {nearest(name, expected)}")
    for name in expected:
        if name not in found:
            raise InputError(f"{source}: {shown(name)} is missing; use a file that was saved from this {arch} config")


def save_arrays(
    path: str | Path, arrays: Mapping[str, np.ndarray], config: Config, kind: str, more: Mapping[str, str] | None = None
) -> None:
    """Write named arrays under a `kind` of their own; an optimiser's moments, say. more: further metadata."""
    metadata = {**(more or {}), "format": "unisono", "version": VERSION, "kind": kind, "config": json.dumps(config_to_dict(config))}
    write_bytes(path, _ordered(save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)))


def _ordered(data: bytes) -> bytes:
    """The same file with its metadata in alphabetical order, which safetensors leaves to chance: equal arrays make equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format pads its header with spaces
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_arrays(path: str | Path, kind: str, check: Check | None = None) -> tuple[Config, Arrays]:
    """Read what `save_arrays` wrote under `kind`. check: looks at what the file declares before anything of that size is read."""
    if isinstance(path, (str, os.PathLike)) and is_folder(Path(path)):
        raise InputError(f"{path}: a folder; give the file in it, such as {Path(path) / 'model.safetensors'}")
    if not isinstance(path, (str, os.PathLike)) or not is_file(Path(path)):
        named = path if isinstance(path, os.PathLike) else shown(path)
        raise InputError(f"{named}: no such file; give the path of a .safetensors file that unisono wrote")
    remedy = "it may be truncated, restore it or save it again"
    try:
        metadata, declared = read_header(Path(path))
        if metadata.get("format") != "unisono":
            raise InputError(f"{path}: a safetensors file, but not one of unisono's; save it with unisono_spec.contract.files.save_params")
        if metadata.get("version") != VERSION:
            found = shown(metadata.get("version"))
            raise InputError(f"{path}: file version {found}, this unisono reads {VERSION!r}; install the matching release")
        if metadata.get("kind") != kind:
            raise InputError(f"{path}: holds {shown(metadata.get('kind'))}, expected {kind!r}; give the other file")
        config = read_config(metadata.get("config", ""), str(path))
        if check is not None:
            check(config, declared)
        check_fits(Path(path).stat().st_size, str(path), "use a smaller model")
        with safe_open(path, framework="numpy") as file:
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); {remedy}") from error


def read_config(text: str, source: str) -> Config:
    """The config in a file's metadata, as `json.dumps(config_to_dict(config))` wrote it."""
    values = read_json(text, f"{source}: its config", "save it again")
    try:
        return config_from_dict(values)
    except InputError as error:
        raise InputError(f"{source}: its config says {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a file that `load_arrays` has read says beside its arrays."""
    return read_header(Path(path))[0]


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Declared]]:
    """Metadata, and what is declared of each array. ValueError, or InputError, where it is not such a header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"its header is said to have {size} bytes")
        text = file.read(size)
    if len(text) < max(size, 2):
        raise ValueError("its header is cut short")
    header = read_json(text, f"{path}: not a readable safetensors file", "restore it or save it again", MAX_HEADER)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is not names with arrays")
    declared = {}
    for name, values in header.items():
        entry = build(_Entry, values, f"{path}: {shown(name)}")
        if not all(type(n) is int and n >= 0 for n in entry.shape) or entry.dtype not in _STORED:
            raise InputError(f"{path}: {shown(name)} is {shown(entry.shape)} of {shown(entry.dtype)}; save it as {', '.join(_STORED)}")
        declared[name] = Declared(tuple(entry.shape), _STORED[entry.dtype])
    return metadata, declared


@dataclasses.dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: list[int]
    data_offsets: list[int]


def cast_state(config: Config, state: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    """`state` in the dtypes that compute dtype `dtype` calls for."""
    states, floats = config.states(), DTYPES[state_dtype(dtype)]
    return {name: np.asarray(a).astype(np.int32 if states[name].integer else floats) for name, a in state.items()}
