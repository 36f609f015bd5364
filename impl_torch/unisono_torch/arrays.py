"""Between torch tensors and NumPy arrays, bfloat16 included."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from unisono_spec.contract import Arrays, InputError
from unisono_spec.contract.checks import as_array
from unisono_spec.contract.errors import shown

from unisono_torch.ops.transforms import transformed

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A NumPy copy of the tensor, in its dtype."""
    if tensor.is_meta:
        raise InputError("device: a tensor on 'meta' holds no numbers; put weights in its place, by load_state_dict(…, assign=True)")
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


def from_numpy(array: np.ndarray, device: torch.device | str | None = None) -> Tensor:
    """A tensor of its own memory on `device`, in the array's dtype."""
    array = np.asarray(array, array.dtype.newbyteorder("="), order="C")  # torch knows no negative strides, nor another byte order
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.int16), device=device).view(torch.bfloat16)
    return torch.tensor(array, device=device)


def find_device(device: torch.device | str) -> torch.device:
    """The device that `device` names; InputError where it cannot be used here."""
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise InputError("device: 'meta' holds no numbers; use 'cpu'")
        return found
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"device: {shown(device)} cannot be used here ({str(error).splitlines()[0]}); use 'cpu'") from error


def place(device: torch.device | str | None) -> torch.device:
    """The same where "meta" will do, and None is torch's default device."""
    device = torch.get_default_device() if device is None else device  # that of `with torch.device(…)`, too
    return torch.device("meta") if isinstance(device, (str, torch.device)) and str(device) == "meta" else find_device(device)


def check_device(device: torch.device, given: Mapping[str, Tensor | None]) -> None:
    """Raise InputError where something lies on another device than the parameters, which are on `device`."""
    for name, a in given.items():
        if a is not None and a.device != device:
            raise InputError(f"{name}: on {a.device}, the model is on {device}; move it with .to({str(device)!r})")


def numpy_params(model: nn.Module) -> Arrays:
    """Every parameter by its contract name."""
    return {name: to_numpy(p) for name, p in model.state_dict().items()}


def numpy_state(state: Mapping[str, Tensor]) -> Arrays:
    return {name: to_numpy(a) for name, a in state.items()}


def state_from_numpy(state: Mapping[str, np.ndarray], device: torch.device | str | None = None) -> dict[str, Tensor]:
    return {name: from_numpy(as_array(f"state: {name}", a), device) for name, a in state.items()}


def owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each array in memory of its own and no more: an op may hand on a slice of a whole sequence."""
    return {name: a if _alone(a) else a.clone(memory_format=torch.contiguous_format) for name, a in state.items()}


def _alone(a: Tensor) -> bool:
    if not readable(a):
        return False  # which storage it will have is not known
    return a.untyped_storage().nbytes() == a.numel() * a.element_size()


def recorded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What autograd can keep: of arrays made under torch.inference_mode, outside it, copies."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return dict(state)
    return {name: a.clone() if a.is_inference() else a for name, a in state.items()}


def readable(a: Tensor) -> bool:
    """Whether `a` has values and memory here and now: not in a graph being captured, nor under a transform of torch.func."""
    return not (torch.compiler.is_compiling() or transformed() or a.is_meta)
