"""The specification of Unisono's models, in NumPy: written to be read next to the papers, and to judge every other room."""

from unisono_spec.contract import InputError, preset, presets
from unisono_spec.contract.sampling import Sampling
from unisono_spec.models import create, from_hf, load
from unisono_spec.models.base import Model, numpy_params, numpy_state, state_from_numpy

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
