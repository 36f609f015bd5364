"""The recurrence that diagonal state spaces share: h_t = a_t ∘ h_{t−1} + b_t, elementwise, for |a| ≤ 1.

Two short loops of about √T steps, whatever lies in the other axes: one inside blocks of √T tokens, all blocks at once, and one over
the blocks. Products of a are only ever multiplied up, never divided, so nothing overflows and a = 0 forgets exactly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unisono_torch.ops.transforms import transformed


def linear_scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """a, b [B, T, …], initial [B, …] → h [B, T, …]. Differentiable as often as one likes."""
    if transformed():
        h, out = initial, []
        for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
            h = a_t * h + b_t
            out.append(h)
        return torch.stack(out, 1)
    return _LinearScan.apply(a, b, initial)


class _LinearScan(torch.autograd.Function):
    """With g_t the gradient of h_t, what reaches b_t is s_t = g_t + a_{t+1} s_{t+1}: the same recurrence, backwards in time."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
        return _scan(a, b, initial)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        a, _, initial = inputs
        ctx.save_for_backward(a, initial, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, initial, h = ctx.saved_tensors
        backwards = torch.cat([torch.zeros_like(a[:, :1]), a[:, 1:].flip(1)], 1)
        s = linear_scan(backwards, gradient.flip(1), torch.zeros_like(initial)).flip(1)
        before = torch.cat([initial[:, None], h[:, :-1]], 1)
        return s * before, s, s[:, 0] * a[:, 0]


def _scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    batch, length, rest = a.shape[0], a.shape[1], a.shape[2:]
    size = math.isqrt(length - 1) + 1
    blocks = -(-length // size)
    behind = blocks * size - length
    if behind:
        a, b = (torch.cat([x, x.new_zeros(batch, behind, *rest)], 1) for x in (a, b))
    a, h = a.reshape(batch, blocks, size, *rest), b.reshape(batch, blocks, size, *rest).clone()
    reach = a.clone()  # the product of a since the block began
    for i in range(1, size):
        h[:, :, i].addcmul_(a[:, :, i], h[:, :, i - 1])
        reach[:, :, i].mul_(reach[:, :, i - 1])
    carry = initial
    for n in range(blocks):
        h[:, n].addcmul_(reach[:, n], carry[:, None])
        carry = h[:, n, -1]
    return h.reshape(batch, blocks * size, *rest)[:, :length]
