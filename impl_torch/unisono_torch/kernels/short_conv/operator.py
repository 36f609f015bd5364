"""`unisono::short_conv`, the PyTorch operator around the kernels: how they are launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops import elementwise
from unisono_torch.ops.transforms import again

COLUMNS = 128  # channels a program
ROWS = {"forward": 16, "backward": 64}  # tokens a program, of which the way back leaves a sum to be added
EACH = 4  # tokens that the way back reads ahead
FEW = 4  # taps; of more, fewer numbers a thread are held, by more warps
WARPS = {"forward": 4, "backward": 1}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cut(kernel: str, length: int) -> tuple[int, int]:
    """Rows a program, and programs a sequence of `length`."""
    rows = 16 if interpreted() else ROWS[kernel]
    return rows, -(-length // rows)


def _launch(kernel: str, x: Tensor, taps: int, length: int, tensors: dict[str, Tensor | None], **flags: bool) -> None:
    import triton.language as tl

    from unisono_torch.kernels.short_conv import sweep

    batch, time, width = x.shape
    function, (rows, programs) = getattr(sweep, kernel), _cut(kernel, length)
    arguments = {
        **tensors,
        **flags,
        "x": x,
        "T": time,
        "programs": programs,
        "X_ROW": x.stride(1),
        "D": width,
        "TAPS": taps,
        "HAS_BIAS": tensors["bias"] is not None,
        "HAS_OWNER": tensors["owner"] is not None,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "ROWS": rows,
        "COLUMNS": COLUMNS,
        "EACH": EACH,
    }
    given = {name: arguments[name] for name in function.arg_names}
    warps = WARPS[kernel] * (1 if taps <= FEW else 2 if kernel == "forward" else 4)
    function[(batch * programs * -(-width // COLUMNS),)](**given, num_warps=warps)


def _rows(a: Tensor) -> Tensor:
    """[B, T, D] of which each row of D lies in one piece, rows of a sequence evenly and sequences end to end; else a copy."""
    return a if a.stride(2) == 1 and a.stride(0) == a.shape[1] * a.stride(1) else a.contiguous()


def _whole(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.contiguous()


@torch.library.custom_op(
    "unisono::short_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor? owner, bool silu, ScalarType out_dtype) -> Tensor",
)
def _conv(x, weight, bias, state, owner, silu, out_dtype):
    """weight [D, TAPS], bias [D] and state [B, TAPS − 1, D] in the accumulator's dtype, owner [B, TAPS − 1 + T] int64."""
    y = _conv_fake(x, weight, bias, state, owner, silu, out_dtype)
    if x.numel():
        tensors = {"weight": weight.contiguous(), "bias": _whole(bias), "state": state.contiguous(), "y": y, "owner": _whole(owner)}
        with torch.cuda.device_of(x):
            _launch("forward", _rows(x), weight.shape[1], x.shape[1], tensors, SILU=silu)
    return y


@_conv.register_fake
def _conv_fake(x, weight, bias, state, owner, silu, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype)


@torch.library.custom_op(
    "unisono::short_conv_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor? owner, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _conv_backward(dy, x, weight, bias, state, owner, silu):
    """Gradients of x, weight, bias (empty without one) and the state."""
    dx, dweight, dbias, dstate = _conv_backward_fake(dy, x, weight, bias, state, owner, silu)
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_(), dstate.zero_()
    from unisono_torch.kernels import sums

    width, taps = weight.shape
    length = x.shape[1] + taps - 1
    partial = dweight.new_empty((len(x) * _cut("backward", length)[1], (taps + 1) * width))
    tensors = {
        "weight": weight.contiguous(),
        "bias": _whole(bias),
        "state": state.contiguous(),
        "dy": dy.contiguous(),
        "owner": _whole(owner),
    }
    with torch.cuda.device_of(x):
        _launch("backward", _rows(x), taps, length, {**tensors, "dx": dx, "dstate": dstate, "dweight": partial}, SILU=silu)
    sums.added(partial, dweight, dbias, turn=width)
    return dx, dweight, dbias, dstate


@_conv_backward.register_fake
def _conv_backward_fake(dy, x, weight, bias, state, owner, silu):
    dx, dweight, dstate = (torch.empty_like(a, memory_format=torch.contiguous_format) for a in (x, weight, state))
    return dx, dweight, weight.new_empty((0,) if bias is None else bias.shape), dstate


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.out_dtype = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    x, weight, bias, state, owner = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        inputs = x, weight, bias, state, owner, ctx.silu, ctx.out_dtype
        return again(_plain, inputs, ctx.needs_input_grad, (dy,))
    dx, dweight, dbias, dstate = _conv_backward(dy, x, weight, bias, state, owner, ctx.silu)
    return dx, dweight, None if bias is None else dbias, dstate, None, None, None


def _plain(x, weight, bias, state, owner, silu, out_dtype):
    """The same in plain operations, for second derivatives."""
    seen, (_, taps), length = torch.cat([state, x.to(state.dtype)], 1), weight.shape, x.shape[1]
    y = seen.new_zeros(()) if bias is None else bias
    for i in range(taps):
        part = seen[:, i : i + length]
        if owner is not None:
            part = torch.where((owner[:, i : i + length] == owner[:, taps - 1 :])[..., None], part, 0)
        y = y + part * weight[:, i]
    return (elementwise.silu(y) if silu else y).to(out_dtype)


_conv.register_autograd(_gradient, setup_context=_setup)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    owner: Tensor | None = None,
    silu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [B, T, D] of ops/short_conv.py, or SiLU(y) if `silu`: x [B, T, D], weight [D, 1, w], bias [D] or None, state [B, w − 1, D].

    owner [B, w − 1 + T]: the sequence that each input of state and x belongs to; None where all are of one. y is of `out_dtype`, float32 or
    wider unless told.
    """
    acc = accumulator(x.dtype)
    given = weight[:, 0].to(acc), None if bias is None else bias.to(acc), state.to(acc)
    return torch.ops.unisono.short_conv(x, *given, owner, silu, out_dtype or acc)
