"""Checks of what callers give, once for every room, in words a user can act on. They read types, shapes and dtypes; values where free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unisono_spec.contract import preset
from unisono_spec.contract.base import MAX_SIZE, Config
from unisono_spec.contract.errors import InputError, nearest, shown
from unisono_spec.contract.files import check_state
from unisono_spec.contract.ordinary import check_ordinary
from unisono_spec.contract.plain import check_integer

FORMS = ("parallel", "recurrent")
Array = type | tuple[type, ...] | None  # what an array must be; None: anything with a shape and a dtype


def check_config(config: object, seed: object = 0) -> Config:
    """A config as it is, or the preset of that name; InputError unless it is either, and 0 ≤ seed < 2⁶⁴."""
    if isinstance(config, str):
        config = preset(config)
    if not isinstance(config, Config):
        raise InputError(f"config: {shown(config)} has type {type(config).__name__}; give a config, such as preset('cram-demo')")
    check_integer("seed", seed, 0, 2**64 - 1)
    return config


def check_inputs(
    config: Config,
    tokens: Any,
    state: Mapping[str, Any] | None = None,
    reset: Any = None,
    valid: Any = None,
    *,
    one: bool = False,
    array: Array = None,
    complex_step: bool = False,
) -> None:
    """Raise InputError unless types, shapes and dtypes fit `config`.

    tokens: `[B, T]` integers, or `[B, T, F]` floats for frame models; reset, valid: `[B, T]` booleans or None. one: of one token, without
    T, and with a state. array: what arrays must be; anything with `.shape` and `.dtype` unless told.
    """
    for name, given in (("tokens", tokens), ("reset", reset), ("valid", valid)):
        if given is not None or name == "tokens":
            check_array(name, given, array)
    lead = ("B",) if one else ("B", "T")
    wanted = f"[{', '.join((*lead, 'F'))}] floats" if config.reads_frames else f"[{', '.join(lead)}] integers"
    shape, kind = tuple(tokens.shape), _kind(tokens, complex_step)
    if len(shape) != len(lead) + config.reads_frames or kind != ("f" if config.reads_frames else "i"):
        raise InputError(f"tokens: shape {shape} of {tokens.dtype}, expected {wanted}; reshape or convert them")
    if not one and shape[1] == 0:
        raise InputError("tokens: T is 0; give at least one token")
    if config.reads_frames and shape[-1] != config.frame_size:
        raise InputError(f"tokens: frames are {shape[-1]} wide, the config's frame_size is {config.frame_size}; resize them")
    for name, mask in (("reset", reset), ("valid", valid)):
        if mask is not None and (tuple(mask.shape) != shape[: len(lead)] or dtype_kind(mask) != "b"):
            raise InputError(
                f"{name}: shape {tuple(mask.shape)} of {mask.dtype}, expected {shape[: len(lead)]} booleans; pass a mask as long as tokens"
            )
    if state is None and one:
        raise InputError("state: None; one token needs the state before it, start from init_state(batch)")
    if state is not None:
        check_state(config, state, batch=shape[0], complex_step=complex_step)
        for name, value in state.items():
            check_array(f"state: {name}", value, array)


def check_reading(form: object, chunk_size: object) -> None:
    """Raise InputError unless `forward` knows the form and the size of its chunks."""
    if not isinstance(form, str) or form not in FORMS:
        raise InputError(f"form: {shown(form)} is unknown; {nearest(form, FORMS)}")
    check_integer("chunk_size", chunk_size, 1, MAX_SIZE)


def check_training(
    config: Config,
    lead: tuple[int, ...],
    dropout: Any = None,
    noise: Any = None,
    loads: Any = None,
    array: Array = None,
) -> None:
    """Raise InputError unless there is a dropout mask `[*lead, D]` for each update, and noise `[*lead, n]` for each noisy router.

    lead: (B, T), or whatever the axes before the width are.
    """
    widths = config.noise_widths
    if noise is not None and not widths:
        raise InputError("noise: this config has no noisy router; leave noise at None")
    masks = (config.d_model,) * config.n_updates
    for name, given, expected in (("dropout", dropout, masks), ("noise", noise, widths)):
        if given is None:
            continue
        number = len(given) if isinstance(given, (list, tuple)) else next(iter(getattr(given, "shape", ())), None)
        if number != len(expected):
            found = shown(given) if number is None else f"{number} of them"
            raise InputError(f"{name}: {found}, expected {len(expected)} arrays, one for each {_what(name)}; give them all, or None")
        for i, (part, width) in enumerate(zip(given, expected, strict=True)):
            check_array(f"{name}[{i}]", part, array)
            if tuple(part.shape) != (*lead, width) or _kind(part) != "f":
                shape = tuple(part.shape)
                raise InputError(f"{name}[{i}]: shape {shape} of {part.dtype}, expected {(*lead, width)} floats; draw it anew")
    if loads is not None and not isinstance(loads, list):
        raise InputError(f"loads: {shown(loads)} has type {type(loads).__name__}; give a list, which is filled, or None")


def check_ids(tokens: np.ndarray, vocab_size: int, name: str = "tokens") -> None:
    """Raise InputError where an id is outside the vocabulary (frameworks clamp or wrap such ids in silence)."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)].flat[0]
        raise InputError(f"{name}: id {bad} is outside the vocabulary of {vocab_size}; use the tokenizer that the model was trained with")


def check_code(
    config: Config, tokens: Any = None, xi: Any = None, dropout: Any = None, array: Array = None, complex_step: bool = False
) -> None:
    """Raise InputError unless the model has a code that `code(tokens)` and `readout(xi)` know, and these fit it."""
    if not config.code_size:
        raise InputError("code, readout: ξ of the adaptive scheme lies inside each layer; call forward")
    width = config.code_size
    if tokens is not None:
        check_array("tokens", tokens, array)
        kind, shape = "f" if config.reads_frames else "i", tuple(tokens.shape)
        if _kind(tokens, complex_step) != kind or (config.reads_frames and shape[-1:] != (width,)):
            wanted = f"[..., {width}] floats" if config.reads_frames else "integers"
            raise InputError(f"tokens: shape {shape} of {tokens.dtype}, expected {wanted}; reshape or convert them")
    if xi is not None:
        check_array("xi", xi, array)
        if tuple(xi.shape)[-1:] != (width,) or _kind(xi, complex_step) != "f":
            raise InputError(f"xi: shape {tuple(xi.shape)} of {xi.dtype}, expected [..., {width}] floats; give what `code` leads to")
        check_training(config, tuple(xi.shape)[:-1], dropout, array=array)


def dtype_kind(array: Any) -> str:
    """'b', 'i' or 'f' for arrays of NumPy, JAX and torch alike (complex counts as float: the complex step passes it), else '?'."""
    name = str(array.dtype).removeprefix("torch.")
    kinds = {"b": ("bool",), "i": ("int", "uint"), "f": ("float", "bfloat", "complex")}
    return next((kind for kind, names in kinds.items() if name.startswith(names) and "_" not in name), "?")


def _kind(array: Any, complex_step: bool = False) -> str:
    """Complex numbers are floats to the complex step, and nothing that a model reads elsewhere."""
    return "?" if "complex" in str(array.dtype) and not complex_step else dtype_kind(array)


def check_array(name: str, given: Any, array: Array) -> None:
    """Raise InputError unless `given` is an `array`; anything with `.shape` and `.dtype`, where that is None."""
    fits = hasattr(given, "shape") and hasattr(given, "dtype") if array is None else isinstance(given, array)
    if not fits:
        kinds = array if isinstance(array, tuple) else (array,)
        wanted = " or ".join(f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in kinds if kind is not None) or "array"
        raise InputError(f"{name}: {shown(given)} has type {type(given).__name__}; give a {wanted}")
    check_ordinary(name, given)


def _what(name: str) -> str:
    return "residual update" if name == "dropout" else "noisy router"


def as_array(name: str, given: Any) -> Any:
    """What has a shape and a dtype as it is; lists and numbers as NumPy's."""
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        check_ordinary(name, given)  # here too: a room may make it NumPy's before it checks
        return given
    try:
        return np.asarray(given)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{name}: {shown(given)} is no array ({str(error).splitlines()[0]}); give rows of equal length") from error
