"""The absolute position of each token: how many valid tokens its sequence held before it. int32, counted from the state.

Shapes: initial_state [B] int32, reset and valid [B, T] bool or None. Each form returns (position, final state).
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(state: Tensor, reset: Tensor | None = None, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token: reset and valid [B] → position [B], count after it [B]."""
    position = state if reset is None else torch.where(reset, 0, state)
    return position, position + (1 if valid is None else valid.int())


def parallel(initial_state: Tensor, length: int, reset: Tensor | None = None, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[B, T]: valid tokens before each one, less those that came before its sequence began."""
    if valid is None:
        read = torch.arange(1, length + 1, device=initial_state.device).expand(initial_state.shape[0], length)
        before = read - 1
    else:
        read = valid.cumsum(1)  # [B, T]
        before = read - valid.long()
    if reset is None:
        start = -initial_state.long()[:, None]
    else:
        # `starts` holds, by number of resets so far, the count at which that sequence began
        segment = reset.cumsum(1)  # [B, T]
        starts = torch.cat([-initial_state.long()[:, None], torch.zeros_like(before)], 1)  # [B, 1 + T]
        starts = starts.scatter_add(1, segment * reset, before * reset)
        start = starts.gather(1, segment)
    return (before - start).int(), (read - start)[:, -1].int()
