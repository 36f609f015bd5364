"""The sequence ops in the form that an exported graph holds: any T ≥ 1 and any B, at a cost linear in T.

Tracing freezes Python loops at the traced length, so the plain forms' loop over chunks cannot be exported. Here tokens are cut into
N = ⌈T/C⌉ chunks of C = min(T, CHUNK), all sums within chunks are one masked matmul, and an ONNX Scan of N small steps carries the
state from chunk to chunk. At T = 1 all of it shrinks to one token: the same graph decodes without padding.

`torch.onnx.is_in_onnx_export()` selects these forms in `unisono_torch.ops`. They run in eager mode too.

Shapes: x [B, T, D], s [B, T], initial_state [B, D], reset and valid [B, T] bool. Each returns (output, final state).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan  # exported as ONNX Scan; torch has no public name for it yet
from torch.nn import functional as F

CHUNK = 64


def decayed_sum(x: Tensor, decay: float, initial_state: Tensor, reset: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """ξ_t = λ ξ_{t−1} + (1−λ) σ(x_t); see `unisono_torch.ops.decayed_sum`."""
    length = x.shape[1]
    cut = _Cut(length)
    u = cut(torch.where(valid[..., None], torch.sigmoid(x).to(initial_state.dtype), 0))  # [B, N, C, D]
    n = cut(valid.to(torch.int32)).cumsum(2, dtype=torch.int32)  # [B, N, C]
    segment = cut(reset.to(torch.int32)).cumsum(2, dtype=torch.int32)  # [B, N, C]
    reads = _reads(segment)
    # λ^n as exp(n log λ), with log λ from float64: powers stay right to float32 also where λ is near 1
    rate = math.log(decay)
    power = torch.where(reads, n[..., :, None] - n[..., None, :], 0).to(u.dtype)
    xi = torch.where(reads, (1 - decay) * torch.exp(rate * power), 0) @ u
    kept = segment == 0
    before, final = _carry(kept[:, :, -1], torch.exp(rate * n[:, :, -1].to(u.dtype)), xi[:, :, -1], initial_state)
    factor = torch.exp(rate * n.to(u.dtype))[..., None]
    return cut.join(xi + torch.where(kept[..., None], factor * before[:, :, None], 0)), final


def weighted_sum(
    x: Tensor, s: Tensor, initial_state: Tensor, reset: Tensor, valid: Tensor, exclusive: bool = False
) -> tuple[Tensor, Tensor]:
    """ξ_t = ξ_{t−1} + s_t σ(x_t); see `unisono_torch.ops.weighted_sum`."""
    cut = _Cut(x.shape[1])
    u = cut(torch.where(valid[..., None], s[..., None].to(initial_state.dtype) * torch.sigmoid(x).to(initial_state.dtype), 0))
    segment = cut(reset.to(torch.int32)).cumsum(2, dtype=torch.int32)  # [B, N, C]
    xi = _reads(segment, exclusive).to(u.dtype) @ u  # [B, N, C, D]
    kept = segment == 0
    own = xi[:, :, -1] + u[:, :, -1] if exclusive else xi[:, :, -1]
    before, final = _carry(kept[:, :, -1], torch.ones_like(own[..., 0]), own, initial_state)
    return cut.join(xi + torch.where(kept[..., None], before[:, :, None], 0)), final


def position(initial_state: Tensor, reset: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """How many valid tokens each sequence held before each token: [B, T] int32. initial_state [B] int32.

    A segmented count, by the same masked matmul as `weighted_sum`: at most C in float32, so exact, and int32 between chunks.
    """
    cut = _Cut(valid.shape[1])
    one = cut(valid.to(torch.float32))[..., None]  # [B, N, C, 1]
    segment = cut(reset.to(torch.int32)).cumsum(2, dtype=torch.int32)  # [B, N, C]
    before = (_reads(segment, exclusive=True).to(torch.float32) @ one).to(torch.int32)
    kept = segment == 0
    own = before[:, :, -1] + one[:, :, -1].to(torch.int32)
    carried, final = _carry(kept[:, :, -1], torch.ones_like(own[..., 0]), own, initial_state[:, None])
    return cut.join(before + torch.where(kept[..., None], carried[:, :, None], 0))[..., 0], final[:, 0]


class _Cut:
    """Cuts [B, T, …] into chunks [B, N, C, …], zeros behind, and joins them again."""

    def __init__(self, length: Any) -> None:
        self.length = length
        self.chunk = torch.sym_min(length, CHUNK)
        self.n = (length + self.chunk - 1) // self.chunk

    def __call__(self, x: Tensor) -> Tensor:
        padding = self.n * self.chunk - self.length
        return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, padding)).reshape(x.shape[0], self.n, self.chunk, *x.shape[2:])

    def join(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, : self.length]


def _reads(segment: Tensor, exclusive: bool = False) -> Tensor:
    """segment [B, N, C]: resets since the chunk began → which tokens each one sums, [B, N, C, C], query by key."""
    index = torch.arange(segment.shape[2], device=segment.device)
    earlier = index[:, None] > index if exclusive else index[:, None] >= index
    return (segment[..., :, None] == segment[..., None, :]) & earlier


def _carry(kept: Tensor, factor: Tensor, own: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """kept, factor [B, N], own [B, N, D], state [B, D] → the state before each chunk [B, N, D], and after the last [B, D]."""

    def chunk(carry: Tensor, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keep, scale, add = given
        return torch.where(keep, scale * carry, 0) + add, carry.clone()

    final, before = scan(chunk, state, (kept.T[..., None], factor.T[..., None], own.transpose(0, 1)), dim=0)
    return before.transpose(0, 1), final
