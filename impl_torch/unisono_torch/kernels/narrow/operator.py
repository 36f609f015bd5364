"""`unisono::narrow`, the PyTorch operator around sweep.py: how it is launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops.transforms import again

WIDEST = 64  # columns of x; of more, a library's products are as fast
ROWS = {"forward": 64, "inputs": 64, "weights": 64}
COLUMNS = {"forward": 128, "inputs": 64, "weights": 64}
SPLITS = 12  # sums over rows that the way back leaves to be added


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take such a product."""
    return x.dtype == torch.bfloat16 and weight.dtype == torch.float32 and weight.shape[1] <= WIDEST


def _launch(kernel: str, rows: int, tensors: dict[str, Any]) -> None:
    import triton.language as tl

    from unisono_torch.kernels.narrow import sweep

    function: Any = getattr(sweep, kernel)
    (out, into), x = tensors["weight"].shape, tensors.get("x")
    tests = interpreted()
    high, wide = (16, 16) if tests else (ROWS[kernel], COLUMNS[kernel])
    blocks, splits = -(-out // wide), tensors.get("splits", 1)
    programs = {"forward": -(-rows // high) * blocks, "inputs": -(-rows // high), "weights": splits * blocks}[kernel]
    arguments = {
        **tensors,
        "M": rows,
        "N": out,
        "K": into,
        "KP": max(16, 1 << (into - 1).bit_length()),
        "X_ROW": 0 if x is None else x.stride(0),
        "HAS_BIAS": tensors.get("bias") is not None,
        "DOT": tl.float32 if tests else tl.bfloat16,
        "ROWS": high,
        "COLUMNS": wide,
    }
    with torch.cuda.device_of(tensors["weight"]):
        function[(programs,)](**{name: arguments[name] for name in function.arg_names}, num_warps=4)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("unisono::narrow", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _narrow(x, weight, bias):
    y = _narrow_fake(x, weight, bias)
    if not x.shape[1]:
        return y.zero_() if bias is None else y.copy_(bias)
    if y.numel():
        tensors = {"x": _dense(x), "weight": weight.contiguous(), "bias": None if bias is None else bias.float().contiguous(), "y": y}
        _launch("forward", len(x), tensors)
    return y


@_narrow.register_fake
def _narrow_fake(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op(
    "unisono::narrow_backward", mutates_args=(), schema="(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)"
)
def _narrow_backward(dy, x, weight):
    """Gradients of x, the weight and the bias."""
    dx, dweight, dbias = _narrow_backward_fake(dy, x, weight)
    if not dy.numel() or not x.shape[1]:
        return dx.zero_(), dweight.zero_(), dbias.copy_(dy.sum(0))
    from unisono_torch.kernels import sums

    dy, weight = dy.contiguous(), weight.contiguous()
    _launch("inputs", len(x), {"dy": dy, "weight": weight, "dx": dx})
    parts = dweight.new_empty((SPLITS, weight.numel() + len(weight)))
    _launch("weights", len(x), {"dy": dy, "x": _dense(x), "weight": weight, "sums": parts, "splits": SPLITS})
    sums.added(parts, dweight, dbias, turn=weight.numel())
    return dx, dweight, dbias


@_narrow_backward.register_fake
def _narrow_backward_fake(dy, x, weight):
    dx, dweight = (torch.empty_like(a, memory_format=torch.contiguous_format) for a in (x, weight))
    return dx, dweight, weight.new_empty(len(weight))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_plain, (x, weight, bias), ctx.needs_input_grad, (dy,))
    dx, dweight, dbias = _narrow_backward(dy, x, weight)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype)


def _plain(x, weight, bias):
    """The same in plain operations, for second derivatives."""
    return F.linear(x.float(), weight, bias)


_narrow.register_autograd(_gradient, setup_context=_setup)


def narrow(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] → x Wᵀ + b [..., N] in float32, of which no digit of x or W is dropped."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return torch.ops.unisono.narrow(rows, weight, bias).reshape(*x.shape[:-1], len(weight))
