"""Between NumPy and JAX: parameters and states by the contract's names, devices, and JAX's 64-bit mode."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from unisono_spec.contract import InputError
from unisono_spec.contract.checks import as_array
from unisono_spec.contract.errors import shown

ARRAYS = (jax.Array, np.ndarray, np.generic)  # what models take; traced arrays are jax.Arrays


def drawn_key(rngs: object, name: str) -> jax.Array:
    """The next key of a stream of `rngs`, or of its default one; InputError unless it is an nnx.Rngs that has either."""
    if not isinstance(rngs, nnx.Rngs):
        raise InputError(f"rngs: {shown(rngs)} has type {type(rngs).__name__}; give nnx.Rngs(seed)")
    if name not in rngs and "default" not in rngs:
        raise InputError(f"rngs: has neither a stream {name!r} nor a default one; give nnx.Rngs(seed) or nnx.Rngs({name}=seed)")
    return rngs[name]()


def numpy_params(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every parameter and buffer by its contract name, in the contract's order, as it is held (bfloat16 is ml_dtypes')."""
    found = {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return {name: found[name] for name in model.config.params()}  # pyright: ignore[reportAttributeAccessIssue]


def numpy_state(state: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """A running state as NumPy arrays of their own, for `unisono_spec.contract.files.save_state` or another room."""
    return {name: np.array(a) for name, a in state.items()}


def state_from_numpy(state: Mapping[str, np.ndarray], device: Any = None) -> dict[str, jax.Array]:
    """A running state from any room. `forward` and `step` cast it to their model's dtypes."""
    return {name: place(as_array(f"state: {name}", a), device) for name, a in state.items()}


def find_devices(name: str) -> list[Any]:
    """All `jax.Device`s of a platform, or the one that a number behind it names, as in `cuda:1`; InputError where none is here."""
    platform, colon, index = name.partition(":")
    try:
        if not platform or (colon and not index.isdecimal()):
            raise ValueError("a platform's name, with or without the number of a device")
        found = jax.devices(platform)
        return [found[int(index)]] if colon else found
    except (RuntimeError, IndexError, ValueError) as error:
        raise _no_device(name) from error


def place(array: np.ndarray, device: Any = None) -> jax.Array:
    """A copy of `array` on `device`: a jax.Device, a platform's name, or None for JAX's default."""
    if isinstance(device, str):
        device = find_devices(device)[0]
    elif device is not None and not isinstance(device, (jax.Device, jax.sharding.Sharding)):
        raise _no_device(device)
    # in memory of its own, since on a CPU JAX may keep what it is given; in the machine's byte order, the only one that JAX knows
    array = np.array(array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return jnp.asarray(array) if device is None else jax.device_put(array, device)
    except (TypeError, ValueError) as error:
        if device is None:
            raise
        raise _no_device(device) from error


def _no_device(device: Any) -> InputError:
    known = ", ".join(str(d) for d in jax.devices())
    return InputError(f"device: {shown(device)} is not here; JAX sees {known}; install a JAX for it or leave device out")


class _Process:
    """Whether JAX has computed here, and whether it had before this process was forked off."""

    used = forked = False

    @classmethod
    def after_fork(cls) -> None:
        cls.forked = cls.used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Process.after_fork)


def check_x64(dtype: str) -> str:
    """`dtype`, if JAX keeps it: outside its 64-bit mode it turns float64 into float32 in silence.

    Also where JAX still works at all: InputError in a process that was forked after JAX had computed.
    """
    if _Process.forked:
        raise InputError("process: forked after JAX had computed, without its threads; start processes by multiprocessing's 'spawn'")
    _Process.used = True
    if dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise InputError("dtype: 'float64' needs JAX's 64-bit mode; wrap the call in `with jax.enable_x64(True):` or set JAX_ENABLE_X64=1")
    return dtype
