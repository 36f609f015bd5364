"""Training and reading with PyTorch."""

from __future__ import annotations

import torch

from unisono_tools.backends.base import peak_of_process
from unisono_tools.backends.torch.objective import dropout_masks
from unisono_tools.backends.torch.ranks import leave
from unisono_tools.backends.torch.reader import Reader
from unisono_tools.backends.torch.trainer import Trainer

__all__ = ["Reader", "Trainer", "device_name", "dropout_masks", "forget_peak", "leave", "peak_bytes"]


def device_name(device: str | None = None) -> str:
    """What `device` is, by default what a trainer would choose."""
    cuda = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    return torch.cuda.get_device_name() if cuda else "CPU"


def peak_bytes() -> int:
    """The most that this process has held: of a GPU's memory where it used one, else of the machine's."""
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0) or peak_of_process()


def forget_peak() -> bool:
    """Let `peak_bytes` be of what follows alone, where a GPU is used; whether it is."""
    if not torch.cuda.is_initialized():
        return False
    torch.cuda.empty_cache()  # for the processes beside it
    torch.cuda.reset_peak_memory_stats()
    return True
