"""The specification of Unisono's models, in NumPy: written to be read next to the papers, and to judge every other room."""

from unisono_spec.contract import InputError, preset, presets
from unisono_spec.models import create, load

__all__ = ["InputError", "create", "load", "preset", "presets"]
