"""What all rooms agree on: configs, presets, names, shapes and initial values, files, and sampling. No model mathematics."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from unisono_spec.contract.base import ANY, DTYPES, Arrays, Config, Param, State, check_dtype, initial_state, state_dtype, zero_state
from unisono_spec.contract.errors import InputError, nearest, shown
from unisono_spec.contract.initial import initialize
from unisono_spec.contract.memory import check_fits
from unisono_spec.contract.plain import check_integer

__all__ = [
    "ANY",
    "ARCHITECTURES",
    "DTYPES",
    "Arrays",
    "Config",
    "InputError",
    "Param",
    "State",
    "check_dtype",
    "config_class",
    "config_from_dict",
    "config_to_dict",
    "count_params",
    "init_params",
    "initial_state",
    "nearest",
    "preset",
    "presets",
    "state_dtype",
    "zero_state",
]

# A new architecture is one module in this package with CONFIG and PRESETS, and its name here.
ARCHITECTURES = ("cram", "lat", "infinityformer", "maru", "transformer", "mamba", "s4d")


def config_class(arch: str) -> type[Config]:
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise InputError(f"arch: {shown(arch)} is unknown; {nearest(arch, ARCHITECTURES)}")
    return importlib.import_module(f"unisono_spec.contract.{arch}").CONFIG


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """A config from plain values with an `arch` key, as `config_to_dict` writes them."""
    if not isinstance(values, Mapping):
        raise InputError(f"config: {shown(values)} has type {type(values).__name__}; give names with values, `arch` among them")
    if "arch" not in values:
        raise InputError(f"arch: missing; add one of {', '.join(ARCHITECTURES)}")
    return config_class(values["arch"]).from_dict({k: v for k, v in values.items() if k != "arch"})


def config_to_dict(config: Config) -> dict[str, Any]:
    return {"arch": config.arch, **config.to_dict()}


def presets() -> dict[str, Config]:
    """Every preset of every architecture, by name."""
    return {name: c for arch in ARCHITECTURES for name, c in importlib.import_module(f"unisono_spec.contract.{arch}").PRESETS.items()}


def preset(name: str, **changes: Any) -> Config:
    """The preset `name`, with some fields changed."""
    known = presets()
    if not isinstance(name, str) or name not in known:
        raise InputError(f"preset: {shown(name)} is unknown; {nearest(name, known)}")
    return known[name].replace(**changes)


def count_params(config: Config) -> int:
    """How many numbers are trained."""
    return sum(math.prod(p.shape) for p in config.params().values() if p.trainable)


def init_params(config: Config, seed: int = 0, dtype: str = "float32") -> Arrays:
    """Initial parameters by name, the same for every room. 0 ≤ seed < 2⁶⁴."""
    check_integer("seed", seed, 0, 2**64 - 1)
    size = DTYPES[check_dtype(dtype)].itemsize * sum(math.prod(p.shape) for p in config.params().values())
    check_fits(size, f"{config.arch}'s parameters", "use a smaller model, or a narrower dtype")
    return {name: initialize(p.initial, p.shape, seed, name).astype(DTYPES[check_dtype(dtype)]) for name, p in config.params().items()}
