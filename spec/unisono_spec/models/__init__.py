"""Whole models: order of blocks and the four verbs (init_state, forward, step, generate)."""

from __future__ import annotations

import importlib
from pathlib import Path

from unisono_spec.contract import Arrays, Config, check_dtype, init_params
from unisono_spec.contract.checks import check_config
from unisono_spec.contract.files import load_params
from unisono_spec.contract.published import read as read_published
from unisono_spec.models.base import Model


def create(config: Config | str, params: Arrays | None = None, seed: int = 0, dtype: str = "float64") -> Model:
    """A model of `config`, or of the preset of that name, from `params` or from initial values drawn with `seed`.

    It computes in `dtype`, float32 or float64.
    """
    config, dtype = check_config(config, seed), check_dtype(dtype)
    module = importlib.import_module(f"unisono_spec.models.{config.arch}")
    return module.MODEL(config, init_params(config, seed, dtype) if params is None else params, dtype)


def load(path: str | Path, dtype: str = "float64") -> Model:
    """A model from a safetensors file that any room wrote."""
    config, params = load_params(path)
    return create(config, params, dtype=dtype)


def from_hf(source: str | Path, revision: str | None = None, dtype: str = "float64") -> Model:
    """A model from a checkpoint that others published, by contract/published: a folder, or owner/name on the hub."""
    published = read_published(source, revision)
    return create(published.config, published.params, dtype=dtype)
