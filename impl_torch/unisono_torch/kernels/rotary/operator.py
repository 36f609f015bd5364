"""`unisono::rotary`, the PyTorch operator around sweep.py: how it is launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions. Saved for the backward: inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops.transforms import again

PAIRS = 1024  # turned by a program: eight a thread, one load of 16 bytes


def _rows(K: int) -> tuple[int, int]:
    """(rows a program, columns of a tile)."""
    block = 1 << (K // 2 - 1).bit_length()
    return max(1, (64 if interpreted() else PAIRS) // block), block


def _launch(way: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, feature_map: str, numerator: bool, tensors: dict[str, Any]) -> None:
    from unisono_torch.kernels.rotary import sweep

    batch, length, heads, K = q.shape
    rows, block = _rows(K)
    blocks = -(-length * heads // rows)
    strided = {"q": q, "k": k} | ({"d": tensors["dq"]} if way == "backward" else {})
    strides = {f"{name}{axis}": a.stride(axis) for name, a in strided.items() for axis in range(3)}
    unit = 16 if all(step % 16 == 0 for step in strides.values()) else 1  # so that loads are as wide as strides allow
    kernel: Any = getattr(sweep, way)
    with torch.cuda.device_of(q):
        kernel[(batch * blocks,)](
            q=q, k=k, cos=cos, sin=sin, **tensors, T=length, blocks=blocks, SHARED=len(cos) == 1,
            **{name: step // unit for name, step in strides.items()}, UNIT=unit, H=heads, K=K, MAP=feature_map, NUMERATOR=numerator,
            ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip


def _programs(q: Tensor) -> int:
    batch, length, heads, K = q.shape
    return batch * -(-length * heads // _rows(K)[0])


def _dense(a: Tensor) -> Tensor:
    return a if a.stride(-1) == 1 else a.contiguous()


_INPUTS = "Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? tau, str feature_map, bool numerator"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op("unisono::rotary", mutates_args=(), schema=f"({_INPUTS}) -> {_FOUR}")
def _turn(q, k, cos, sin, tau, feature_map, numerator):
    outputs = _turn_fake(q, k, cos, sin, tau, feature_map, numerator)
    if q.numel():
        names = "q_out", "k_out", "q_before", "k_before"
        _launch(
            "forward", _dense(q), _dense(k), cos.contiguous(), sin.contiguous(), feature_map, numerator,
            {"tau": tau, **dict(zip(names, outputs, strict=True))},
        )  # fmt: skip
    return outputs


@_turn.register_fake
def _turn_fake(q, k, cos, sin, tau, feature_map, numerator):
    shape = q.shape if numerator else (0,)
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty(shape), k.new_empty(shape)


@torch.library.custom_op(
    "unisono::rotary_backward",
    mutates_args=(),
    schema=f"(Tensor dq_out, Tensor dk_out, Tensor dq_before, Tensor dk_before, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _turn_backward(dq_out, dk_out, dq_before, dk_before, q, k, cos, sin, tau, feature_map, numerator):
    """Gradients of q, k and τ (empty without it)."""
    given = (dq_out, dk_out, dq_before, dk_before)
    dq, dk, dtau = _turn_backward_fake(*given, q, k, cos, sin, tau, feature_map, numerator)
    turn_back(given, q, k, cos, sin, tau, feature_map, numerator, dq, dk, dtau)
    return dq, dk, dtau


def turn_back(
    given: tuple[Tensor, ...], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, tau: Tensor | None, feature_map: str, numerator: bool,
    dq: Tensor, dk: Tensor, dtau: Tensor,
) -> None:  # fmt: skip
    """Gradients into dq and dk, which lie alike, and dtau. given: gradients of what `_turn` gave."""
    if not q.numel():
        dtau.zero_()
        return
    names = "dq_out", "dk_out", "dq_before", "dk_before"
    partial = None if tau is None else q.new_empty((_programs(q),), dtype=torch.float32)
    _launch(
        "backward", _dense(q), _dense(k), cos.contiguous(), sin.contiguous(), feature_map, numerator,
        {"tau": tau, **{name: a.contiguous() for name, a in zip(names, given, strict=True)}, "dq": dq, "dk": dk, "dtau": partial},
    )  # fmt: skip
    if partial is not None:
        dtau.copy_(partial.sum().reshape(dtau.shape))


@_turn_backward.register_fake
def _turn_backward_fake(dq_out, dk_out, dq_before, dk_before, q, k, cos, sin, tau, feature_map, numerator):
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty((0,)) if tau is None else tau.new_empty(tau.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.feature_map, ctx.numerator = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, *gradients):
    q, k, cos, sin, tau = ctx.saved_tensors
    how = ctx.feature_map, ctx.numerator
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_plain, (q, k, cos, sin, tau, *how), ctx.needs_input_grad, gradients)
    dq, dk, dtau = _turn_backward(*gradients, q, k, cos, sin, tau, *how)
    return dq, dk, None, None, None if tau is None else dtau, None, None


def _plain(q, k, cos, sin, tau, feature_map, numerator):
    """The same in plain operations, for second derivatives."""
    from unisono_torch.ops import rotary

    q2, k2, *before = rotary.turned(q, k, cos, sin, feature_map, tau, numerator, "plain")
    before = before if numerator else [q.new_empty((0,))] * 2
    return tuple(a.to(q.dtype) for a in (q2, k2, *before))


_turn.register_autograd(_gradient, setup_context=_setup)
