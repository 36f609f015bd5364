"""Whole models: order of blocks and the four verbs (init_state, forward, step, generate)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from jax.core import Tracer
from unisono_spec.contract import DTYPES, Config, InputError, check_dtype, init_params
from unisono_spec.contract.base import Arrays
from unisono_spec.contract.checks import check_config
from unisono_spec.contract.files import check_params, load_params
from unisono_spec.contract.published import read as read_published

from unisono_jax.arrays import ARRAYS, check_x64, place
from unisono_jax.models.base import Model


def create(
    config: Config | str,
    params: Arrays | None = None,
    seed: int = 0,
    dtype: Any = "float32",
    param_dtype: Any = None,
    device: Any = None,
    implementation: str = "auto",
) -> Model:
    """A model of `config`, or of the preset of that name, from `params` or from initial values drawn with `seed`.

    dtype: what it computes in ("float64" needs JAX's 64-bit mode). param_dtype: what parameters are held in; None is float32, or
    float64 where dtype is. Both as names or as JAX's own. device: a jax.Device, a platform's name ("cpu", "cuda"), or None for
    JAX's default.
    """
    config, dtype = check_config(config, seed), check_x64(check_dtype(dtype))
    held = check_x64(check_dtype(param_dtype if param_dtype is not None else "float64" if dtype == "float64" else "float32"))
    if params is None:
        params = init_params(config, seed, held)
    check_params(config, params, array=ARRAYS)
    if any(isinstance(p, Tracer) for p in params.values()):
        raise InputError("params: traced; make the model outside of jit, nnx.split it, and nnx.merge what is traced")
    arrays = {name: place(p.astype(DTYPES[held]), device) for name, p in params.items()}
    return importlib.import_module(f"unisono_jax.models.{config.arch}").MODEL(config, arrays, dtype, implementation)


def load(
    path: str | Path,
    dtype: str = "float32",
    param_dtype: str | None = None,
    device: Any = None,
    implementation: str = "auto",
) -> Model:
    """A model from a safetensors file that any room wrote."""
    config, params = load_params(path)
    return create(config, params, dtype=dtype, param_dtype=param_dtype, device=device, implementation=implementation)


def from_hf(source: str | Path, revision: str | None = None, **options: Any) -> Model:
    """A model from a checkpoint that others published: Mamba's, or flash-linear-attention's where its definition is LAT's.

    source: a folder with config.json and safetensors, or owner/name on the hub, which needs huggingface_hub; revision: a branch, tag or
    commit there. `options` as for `create`. Raises InputError, which names the field, where the model is none of ours.
    """
    published = read_published(source, revision)
    return create(published.config, published.params, **options)
