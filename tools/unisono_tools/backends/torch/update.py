"""What a step does once its gradient is there, decided on the device alone: the host waits for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from unisono_spec.contract import Arrays

from unisono_tools.backends.base import GROWTH, SCALE, SCALE_FLOOR, SCALE_LIMIT, Step


class Pending:
    """A step's numbers on their way to the host."""

    def __init__(self, nats: Tensor, *values: Tensor) -> None:
        """nats: the loss, and those of the groups [1 + G]."""
        numbers = [nats[:1], *(v[None] for v in values), nats[1:]]
        self.values, self.arrived = torch.cat([v.detach().to(nats.dtype) for v in numbers]), None
        if self.values.is_cuda:
            # to memory that the device can write by itself; .item() would wait for all that has been asked for since
            host = torch.empty_like(self.values, device="cpu", pin_memory=True)
            host.copy_(self.values, non_blocking=True)
            self.values, self.arrived = host, torch.cuda.Event()
            self.arrived.record()

    def read(self) -> Step:
        """Wait for this step, and for no later one."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, scale, skipped, *groups = self.values.tolist()
        return Step(loss, norm, scale, bool(skipped), tuple(groups))


class Scaler:
    """Loss scaling for float16 (Micikevicius et al. 2018), by the rule of `base.SCALE`."""

    def __init__(self, device: torch.device, saved: Arrays | None) -> None:
        def number(name: str, initial: float, dtype: torch.dtype) -> Tensor:
            value = initial if saved is None or name not in saved else saved[name][0].item()
            return torch.tensor(value, dtype=dtype, device=device)

        self.scale = number("scale", SCALE, torch.float32)
        self.good, self.skipped = number("scale_steps", 0, torch.int64), number("skipped", 0, torch.int64)

    def update(self, fine: Tensor) -> None:
        good = torch.where(fine, self.good + 1, 0)
        grown = torch.where(good == GROWTH, self.scale * 2, self.scale)
        self.scale = torch.where(fine, grown, self.scale / 2).clamp(SCALE_FLOOR, SCALE_LIMIT)
        self.good = torch.where(good == GROWTH, 0, good)
        self.skipped = self.skipped + (~fine).to(torch.int64)

    def state(self) -> Arrays:
        scale, good, skipped = (t.item() for t in (self.scale, self.good, self.skipped))
        return {
            "scale": np.array([scale], np.float32),
            "scale_steps": np.array([good], np.int64),
            "skipped": np.array([skipped], np.int64),
        }


def adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """Fused, which alone takes from the device whether it shall step at all."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def step_if(optimizer: torch.optim.AdamW, fine: Tensor, lr: float) -> None:
    """Update where `fine`, else leave parameters, moments and count as they are."""
    optimizer.found_inf = (~fine).to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # the next backward pass needs the memory


def multiply(tensors: list[Tensor], factor: Tensor) -> None:
    torch._foreach_mul_(tensors, factor.to(tensors[0].dtype))  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def average_if(average: list[Tensor], now: list[Tensor], fine: Tensor, share: float) -> None:
    """Move each average by `share` of the way to what is now, where `fine`."""
    moved = torch._foreach_sub(now, average)  # pyright: ignore[reportPrivateImportUsage]
    multiply(list(moved), fine.to(now[0].dtype) * share)
    torch._foreach_add_(average, moved)  # pyright: ignore[reportPrivateImportUsage]
