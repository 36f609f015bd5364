"""Whole models: order of blocks and the four verbs (init_state, forward, step, generate)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from unisono_spec.contract import Arrays, Config, check_dtype, init_params
from unisono_spec.contract.checks import check_config
from unisono_spec.contract.files import check_params, load_params
from unisono_spec.contract.published import read as read_published

from unisono_torch.arrays import DTYPES, from_numpy, place
from unisono_torch.models.base import Model
from unisono_torch.ops.dispatch import check_implementation


def create(
    config: Config | str,
    params: Arrays | None = None,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    param_dtype: str | torch.dtype | None = None,
    device: torch.device | str | None = None,
    implementation: str = "auto",
) -> Model:
    """A model of `config`, or of the preset of that name, from `params` or from initial values drawn with `seed`.

    It comes under `.eval()`: `.train()` turns dropout on. dtype: what it computes in, float32, float64, bfloat16 or float16.
    param_dtype: what parameters are held in, float32 unless told (float64 under dtype float64). Both as names or as torch's own.
    device: as torch takes it, torch's default device unless told; "meta" holds shapes and no numbers. implementation: "auto", "plain" or
    "triton". Raises InputError on names or shapes that are not the config's, and on a device or implementation that is not here.
    """
    config, dtype = check_config(config, seed), check_dtype(dtype)
    param_dtype = check_dtype(param_dtype if param_dtype is not None else "float64" if dtype == "float64" else "float32")
    where = place(device)
    check_implementation(implementation, where)  # a kernel that cannot run is an error here, not at the first call
    if where.type == "meta":
        tensors = {name: torch.empty(p.shape, dtype=DTYPES[param_dtype], device=where) for name, p in config.params().items()}
    else:
        params = init_params(config, seed, param_dtype) if params is None else params
        check_params(config, params, array=np.ndarray)
        tensors = {name: from_numpy(params[name], "cpu").to(where, DTYPES[param_dtype]) for name in config.params()}
    module = importlib.import_module(f"unisono_torch.models.{config.arch}")
    with torch.device("meta"):
        model = module.MODEL(config, dtype, implementation)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load(path: str | Path, **options: Any) -> Model:
    """A model from a safetensors file that any room wrote. `options` as for `create`."""
    config, params = load_params(path)
    return create(config, params, **options)


def from_hf(source: str | Path, revision: str | None = None, **options: Any) -> Model:
    """A model from a checkpoint that others published: Mamba's, or flash-linear-attention's where its definition is LAT's.

    source: a folder with config.json and safetensors, or owner/name on the hub, which needs huggingface_hub; revision: a branch, tag or
    commit there. `options` as for `create`. Raises InputError, which names the field, where the model is none of ours.
    """
    published = read_published(source, revision)
    return create(published.config, published.params, **options)
