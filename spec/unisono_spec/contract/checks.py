"""Checks of a model's inputs, in words a user can act on. They read shapes and dtypes; ids are read where that is free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unisono_spec.contract.base import Config, dtype_kind
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.files import check_state


def check_inputs(
    config: Config,
    tokens: Any,
    state: Mapping[str, Any] | None = None,
    reset: Any = None,
    valid: Any = None,
    complex_step: bool = False,
) -> None:
    """Raise InputError unless shapes and dtypes fit `config`.

    tokens: `[B, T]` integers, or `[B, T, F]` floats for frame models; reset, valid: `[B, T]` booleans or None. Arrays of any
    framework will do: only `.shape` and `.dtype` are read.
    """
    rank, what = (3, "[B, T, F] floats") if config.reads_frames else (2, "[B, T] integers")
    shape, kind = tuple(tokens.shape), dtype_kind(tokens)
    if len(shape) != rank or kind != ("f" if config.reads_frames else "i"):
        raise InputError(f"tokens: shape {shape} of {tokens.dtype}, expected {what}; reshape or convert them")
    if shape[1] == 0:
        raise InputError("tokens: T is 0; give at least one token")
    if config.reads_frames and shape[2] != config.frame_size:
        raise InputError(f"tokens: frames are {shape[2]} wide, the config's frame_size is {config.frame_size}; resize them")
    for name, mask in (("reset", reset), ("valid", valid)):
        if mask is not None and (tuple(mask.shape) != shape[:2] or dtype_kind(mask) != "b"):
            raise InputError(
                f"{name}: shape {tuple(mask.shape)} of {mask.dtype}, expected {shape[:2]} booleans; pass a mask as long as tokens"
            )
    if state is not None:
        check_state(config, state, batch=shape[0], complex_step=complex_step)


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """Raise InputError where an id is outside the vocabulary (frameworks clamp or wrap such ids in silence)."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)].flat[0]
        raise InputError(f"tokens: id {bad} is outside the vocabulary of {vocab_size}; use the tokenizer that the model was trained with")
