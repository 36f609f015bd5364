"""Training and reading with JAX: Flax NNX models, optax's AdamW."""

from __future__ import annotations

import jax
from unisono_jax.arrays import find_devices

from unisono_tools.backends.base import peak_of_process
from unisono_tools.backends.jax.functional import functional
from unisono_tools.backends.jax.objective import dropout_masks
from unisono_tools.backends.jax.reader import Reader
from unisono_tools.backends.jax.trainer import Trainer

__all__ = ["Reader", "Trainer", "device_name", "dropout_masks", "forget_peak", "functional", "peak_bytes"]


def device_name(device: str | None = None) -> str:
    """What `device` is, by default what a trainer would choose."""
    found = (find_devices(device) if device else jax.devices())[0]
    return "CPU" if found.platform == "cpu" else found.device_kind


def peak_bytes() -> int:
    """The most that this process has held: of a GPU's memory where it used one, else of the machine's."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) or peak_of_process()


def forget_peak() -> bool:
    """Whether `peak_bytes` is of what follows alone: JAX never forgets."""
    return False
