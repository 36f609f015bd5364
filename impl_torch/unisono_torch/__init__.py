"""Unisono's models in PyTorch. Importing needs no GPU: Triton kernels are imported where they run."""

from unisono_spec.contract import InputError, preset, presets
from unisono_spec.contract.sampling import Sampling

from unisono_torch import nn as nn  # un.nn.LinearAttention, without an import of its own
from unisono_torch.arrays import numpy_params, numpy_state, state_from_numpy
from unisono_torch.models import create, from_hf, load
from unisono_torch.models.base import Model

__all__ = [
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
