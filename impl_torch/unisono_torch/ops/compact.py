"""Moving the valid tokens of each row to its front, so that an op which counts tokens can work on neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from unisono_torch.ops.fold import check_length, masked


class Compact:
    """The order of the valid tokens of `valid` [B, T]; None: all of them.

    read [B]: how many there are. present [B, T]: the places that hold one of them.
    """

    def __init__(self, valid: Tensor | None, like: Tensor) -> None:
        self.valid = valid
        batch, length = like.shape[:2]
        if valid is None:
            self.read = torch.full((batch,), length, device=like.device)
            self.present = torch.ones(batch, length, dtype=torch.bool, device=like.device)
            return
        check_length(like)
        order = valid.cumsum(1)  # [B, T]
        time = torch.arange(length, device=valid.device).expand(batch, length)
        self.read = order[:, -1]
        self.present = time < self.read[:, None]
        self.place = (order - 1).clamp(min=0)
        # tokens that are not valid all go to one place behind the last
        source = torch.zeros(batch, length + 1, dtype=torch.long, device=valid.device)
        self.source = source.scatter(1, torch.where(valid, order - 1, length), time)[:, :length]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, …] → its valid tokens first, and behind them zeros."""
        if self.valid is None:
            return x
        (x,) = masked(self.valid, x)
        (x,) = masked(self.present, take(x, self.source))
        return x

    def unpack(self, x: Tensor) -> Tensor:
        """[B, T, …] → back to where they stood, zeros where no token is valid."""
        if self.valid is None:
            return x
        (x,) = masked(self.valid, take(x, self.place))
        return x


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, …], index [B, S] → [B, S, …]."""
    # by rows, whose gradients are added in a fixed order faster than numbers' are
    first = x.shape[1] * torch.arange(len(x), device=x.device)
    return x.flatten(0, 1).index_select(0, (first[:, None] + index).flatten()).unflatten(0, index.shape)


def segments(reset: Tensor | None, like: Tensor) -> Tensor:
    """How many resets came so far [B, T]; like [B, T, …]."""
    if reset is None:
        return torch.zeros(like.shape[:2], dtype=torch.long, device=like.device)
    check_length(like)
    return reset.cumsum(1)
