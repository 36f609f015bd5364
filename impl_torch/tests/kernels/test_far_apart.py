"""Arrays whose entries lie more than 2³¹ numbers apart: offsets that 32 bits do not hold. Memory that nobody touches costs nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from unisono_torch.kernels import gelu
from unisono_torch.kernels.rows import APART
from unisono_torch.ops import mapped_attention, multiscale, rotary, short_conv, window

BF16 = torch.bfloat16
FAR = 1 << 30
PLACES = 4  # q, k, v and what comes back


def attention(feature_map: str) -> Callable[..., Tensor]:
    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        K = q.shape[-1]
        features = 1 + K + K**2 if feature_map == "taylor2" else K
        state = torch.zeros(len(q), 1, features, K, device=q.device), torch.zeros(len(q), 1, features, device=q.device)
        return mapped_attention.parallel(q, k, v, state, None, None, feature_map, None, 64, "triton")[0]

    return op


def scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    K, device = q.shape[-1], q.device
    state = torch.zeros(len(q), 1, 1, K, K, device=device), torch.zeros(len(q), 1, 1, K, device=device)
    decay, weight = torch.full((1, 1, 1), -0.01, device=device), q[:, :, None, :, :1]
    return multiscale.parallel(q, k, v, q, k, decay, weight, state, implementation="triton")[0]


def near(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = (torch.zeros(len(q), 3, *a.shape[2:], device=q.device) for a in (k, v))
    state = keys, values, torch.zeros(len(q), dtype=torch.int32, device=q.device)
    return window.parallel(q, k, v, state, implementation="triton")[0]


def turn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cos, sin = rotary.cos_sin(torch.arange(q.shape[1], device=q.device)[None], q.shape[-1])
    return torch.cat(rotary.turned(q, k, cos, sin, "elu1", implementation="triton")[:2], 1) + v.mean()


def conv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    width = q.shape[-1]
    weight, state = torch.ones(width, 1, 2, device=q.device), torch.zeros(len(q), 1, width, device=q.device)
    return short_conv.parallel(q[:, :, 0], weight, None, state, implementation="triton")[0][:, :, None] + (k + v).mean()


def gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return gelu.gated(q) + (k + v).mean()


# the op; [B, T, width]; the axis along which entries lie apart, and how far
CASES = {
    "linear_attention, sequences": (attention("elu1"), (2, 1, 16), 0, 2 * FAR),
    "linear_attention, tokens": (attention("elu1"), (1, 82, 16), 1, APART - 16),
    "linear_attention, tokens too far": (attention("elu1"), (1, 3, 16), 1, FAR),
    "on Hopper, sequences": (attention("elu1"), (2, 1, 64), 0, 2 * FAR),
    "on Hopper, tokens": (attention("elu1"), (1, 130, 64), 1, APART - 16),
    "taylor2, sequences": (attention("taylor2"), (2, 1, 4), 0, 2 * FAR),
    "multiscale, sequences": (scales, (2, 1, 16), 0, 2 * FAR),
    "multiscale, tokens": (scales, (1, 82, 16), 1, APART - 16),
    "multiscale, tokens too far": (scales, (1, 3, 16), 1, FAR),
    "window, sequences": (near, (2, 1, 16), 0, 2 * FAR),
    "window, tokens": (near, (1, 3, 16), 1, FAR),
    "rotary, sequences": (turn, (2, 1, 16), 0, 2 * FAR),
    "short_conv, tokens": (conv, (1, 3, 16), 1, FAR),
    "gated GELU": (gate, (3, 1, 16), 0, FAR),  # a stride of 2³¹ would be counted in 64 bits by itself
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, (batch, length, width), axis, step = CASES[name]
    if device == "cpu":
        from triton.runtime import interpreter

        # it would copy all of that memory onto itself
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    shape = batch, length, 1, width
    memory = torch.empty((shape[axis] - 1) * step + PLACES * batch * length * width, dtype=BF16, device=device)

    def far(a: Tensor, place: int) -> Tensor:
        strides = [length * width, width, width, 1] if axis == 0 else [length * step, step, width, 1]
        strides[axis] = step
        return memory.as_strided(a.shape, strides, place * batch * length * width).copy_(a)

    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(shape, generator=made).to(device, BF16) for _ in range(3))
    backward = axis == 0  # which loads as the forward does; in the interpreter it takes its time

    def run(lay: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        *leaves, do = (lay(a, i) for i, a in enumerate((q, k, v, q - k)))
        leaves = [a.detach().requires_grad_(backward) for a in leaves]
        o = op(*leaves)
        if not backward:
            return [o]
        return [o.detach(), *torch.autograd.grad(o, leaves, do if o.shape == do.shape else torch.ones_like(o))]

    assert all(torch.equal(a, b) for a, b in zip(run(far), run(lambda a, _: a), strict=True))
