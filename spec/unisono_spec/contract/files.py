"""Parameters and states as safetensors files: one file loads in every room with no conversion.

Metadata: `format` ("unisono"), `version`, `kind` ("params", "state", …), and `config` as JSON. Never pickle.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from unisono_spec.contract import config_from_dict, config_to_dict
from unisono_spec.contract.base import ANY, DTYPES, Arrays, Config, dtype_kind, state_dtype
from unisono_spec.contract.errors import InputError, nearest

VERSION = "1"


def save_params(path: str | Path, config: Config, params: Mapping[str, np.ndarray]) -> None:
    """Write a model file, whole or not at all."""
    check_params(config, params, str(path))
    save_arrays(path, params, config, "params")


def load_params(path: str | Path) -> tuple[Config, Arrays]:
    """Read a model file written by any room."""
    config, arrays = load_arrays(path, "params")
    check_params(config, arrays, str(path))
    return config, arrays


def save_state(path: str | Path, config: Config, state: Mapping[str, np.ndarray]) -> None:
    """Write a running state, so that another process or framework can continue from it."""
    save_arrays(path, state, config, "state")


def load_state(path: str | Path) -> tuple[Config, Arrays]:
    """Read a running state and the config of the model that it belongs to."""
    config, arrays = load_arrays(path, "state")
    check_state(config, arrays, source=str(path))
    return config, arrays


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all: a full disk or a kill leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror}); free some space or choose another folder") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_params(config: Config, params: Mapping[str, np.ndarray], source: str = "params") -> None:
    """Raise InputError unless `params` has exactly the names and shapes that `config` declares."""
    expected = {name: p.shape for name, p in config.params().items()}
    _check_names(params, expected, source, config.arch)
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise InputError(f"{source}: {name} has shape {params[name].shape}, its config says {shape}; use the file's own config")


def check_state(config: Config, state: Mapping[str, Any], batch: int | None = None, source: str = "state") -> None:
    """Raise InputError unless `state` has the names, shapes and dtypes that `config` declares."""
    expected = config.states()
    _check_names(state, expected, source, config.arch)
    capacities = {state[name].shape[1] for name, s in expected.items() if ANY in s.shape and len(state[name].shape) > 1}
    if len(capacities) > 1:
        raise InputError(f"{source}: caches of {sorted(capacities)} tokens in one state; start from init_state(batch, capacity)")
    if capacities:
        expected = config.states(capacities.pop())
    for name, spec in expected.items():
        shape = tuple(state[name].shape)
        rows = shape[0] if batch is None and shape else batch
        if shape != (rows, *spec.shape):
            raise InputError(f"{source}: {name} has shape {shape}, expected {(rows, *spec.shape)}; start from init_state(batch)")
        if spec.integer != (dtype_kind(state[name]) == "i"):
            wanted = "int32" if spec.integer else "float32 or wider"
            raise InputError(f"{source}: {name} has dtype {state[name].dtype}, expected {wanted}; start from init_state(batch)")


def _check_names(found: Mapping[str, object], expected: Mapping[str, object], source: str, arch: str) -> None:
    for name in found:
        if name not in expected:
            raise InputError(f"{source}: {name!r} does not belong to this {arch} config; {nearest(name, expected)}")
    for name in expected:
        if name not in found:
            raise InputError(f"{source}: {name!r} is missing; use a file that was saved from this {arch} config")


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], config: Config, kind: str) -> None:
    """Write named arrays under a `kind` of their own; an optimiser's moments, say."""
    metadata = {"format": "unisono", "version": VERSION, "kind": kind, "config": json.dumps(config_to_dict(config))}
    write_bytes(path, _ordered(save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)))


def _ordered(data: bytes) -> bytes:
    """The same file with its metadata in alphabetical order, which safetensors leaves to chance: equal arrays make equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format pads its header with spaces
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_arrays(path: str | Path, kind: str) -> tuple[Config, Arrays]:
    """Read what `save_arrays` wrote under `kind`. Names and shapes are the caller's to check."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give the path of a .safetensors file that unisono wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); it may be truncated, restore it or save it again") from error
    if metadata.get("format") != "unisono":
        raise InputError(f"{path}: a safetensors file, but not one of unisono's; save it with unisono_spec.contract.files.save_params")
    if metadata.get("version") != VERSION:
        raise InputError(f"{path}: file version {metadata.get('version')!r}, this unisono reads {VERSION!r}; install the matching release")
    if metadata.get("kind") != kind:
        raise InputError(f"{path}: holds {metadata.get('kind')!r}, expected {kind!r}; give the other file")
    try:
        values = json.loads(metadata["config"])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: its config is unreadable ({error}); save it again") from error
    return config_from_dict(values), arrays


def cast_state(config: Config, state: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    """`state` in the dtypes that compute dtype `dtype` calls for."""
    states, floats = config.states(), DTYPES[state_dtype(dtype)]
    return {name: np.asarray(a).astype(np.int32 if states[name].integer else floats) for name, a in state.items()}
