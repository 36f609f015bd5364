"""Several processes that train one model, as torchrun starts them: each computes its share of every batch, all take the same step."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from unisono_spec.contract import InputError
from unisono_torch.models import find_device

from unisono_tools.config import processes


class Ranks:
    """This process among `size` of them. Alone, every method gives back what it gets."""

    def __init__(self, device: str | None) -> None:
        self.rank, self.size = processes()
        cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if self.size > 1 and cuda and device in (None, "cuda"):
            if local >= torch.cuda.device_count():
                raise InputError(f"device: process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}")
            device = f"cuda:{local}"
            torch.cuda.set_device(local)
        self.device = find_device(device or ("cuda" if cuda else "cpu"))
        if self.size > 1 and not dist.is_initialized():
            # addresses come from torchrun's environment
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over all processes, of equal tensors in equal order: one message a dtype."""
        if self.size == 1:
            return tensors
        out = list(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat)
            for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
                out[i] = part.view_as(tensors[i])
        return out

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.size == 1 else bool(self.sum([torch.tensor(float(flag), device=self.device)])[0] > 0)
