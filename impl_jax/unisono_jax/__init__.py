"""Unisono's models in JAX, as Flax NNX modules: the spec's names, shapes, files and states."""

from unisono_spec.contract import InputError, preset, presets
from unisono_spec.contract.sampling import Sampling

from unisono_jax import nn as nn  # un.nn.LinearAttention, without an import of its own
from unisono_jax.arrays import numpy_params, numpy_state, state_from_numpy
from unisono_jax.models import create, from_hf, load
from unisono_jax.models.base import Compiled, Model

__all__ = [
    "Compiled",
    "InputError",
    "Model",
    "Sampling",
    "create",
    "from_hf",
    "load",
    "numpy_params",
    "numpy_state",
    "preset",
    "presets",
    "state_from_numpy",
]
