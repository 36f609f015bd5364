"""Between torch tensors and NumPy arrays, bfloat16 included."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from unisono_spec.contract import Arrays

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A NumPy copy of the tensor, in its dtype."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


def from_numpy(array: np.ndarray, device: torch.device | str | None = None) -> Tensor:
    """A tensor of its own memory on `device`, in the array's dtype."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.int16), device=device).view(torch.bfloat16)
    return torch.tensor(array, device=device)


def numpy_params(model: nn.Module) -> Arrays:
    """Every parameter by its contract name."""
    return {name: to_numpy(p) for name, p in model.state_dict().items()}


def numpy_state(state: Mapping[str, Tensor]) -> Arrays:
    return {name: to_numpy(a) for name, a in state.items()}


def state_from_numpy(state: Mapping[str, np.ndarray], device: torch.device | str | None = None) -> dict[str, Tensor]:
    return {name: from_numpy(a, device) for name, a in state.items()}
