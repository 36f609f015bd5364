"""Export to ONNX: one graph that reads sequences of any length and decodes token by token (docs/onnx.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisono_spec.contract import Config, InputError
from unisono_spec.contract.errors import shown

from unisono_jax.arrays import numpy_params
from unisono_jax.models.base import Model


def export(model: Model, path: str | Path, metadata: Mapping[str, str] | None = None, **options: Any) -> None:
    """Write `model` as one graph to `path`, whole or not at all; metadata and options as for `unisono_onnx.export`.

    Raises InputError where the model does not compute in float32, and where `unisono_onnx.export` does.
    """
    import unisono_onnx

    if not isinstance(getattr(model, "config", None), Config):
        raise InputError(f"model: {shown(model)} has type {type(model).__name__}; give a model that create or load made")
    if model.dtype != "float32":
        raise InputError(f"dtype: {model.dtype}; export computes in float32: load the checkpoint again with dtype='float32'")
    unisono_onnx.export(model.config, numpy_params(model), path, metadata, **options)
