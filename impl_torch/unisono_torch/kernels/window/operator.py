"""`unisono::window`, the PyTorch operator around sweep.py: how it is launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions. Saved: inputs, o, and a float32 a token and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unisono_torch.kernels.registry import interpreted
from unisono_torch.kernels.window import table
from unisono_torch.ops.transforms import again


class _Call:
    """What all launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, count: Tensor, segment: Tensor | None,
                 do: Tensor | None = None) -> None:  # fmt: skip
        import triton.language as tl

        self.batch, self.length, self.heads, K = q.shape
        self.window, V = keys.shape[1], v.shape[-1]
        moved = {"q": q, "k": k, "v": v, **({} if do is None else {"do": do})}
        self.moved = {n: a if a.stride(-1) == 1 else a.contiguous() for n, a in moved.items()}
        self.carried = {"keys": keys.contiguous(), "values": values.contiguous()}
        self.count, self.segment = count.contiguous(), None if segment is None else segment.contiguous()
        steps = [a.stride(i) for a in self.moved.values() for i in range(3)]
        self.unit = 16 if all(step % 16 == 0 for step in steps) else 1  # so that loads are as wide as strides allow
        self.cut = table.cut(v.dtype, max(K, V), interpreted())
        # the interpreter cannot compute in 16 bits
        dot = tl.float32 if interpreted() else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(v.dtype, tl.float32)
        self.shared = {
            "T": self.length, "H": self.heads, "W": self.window, "K": K, "V": V, "BK": _columns(K), "BV": _columns(V), "DOT": dot,
            "scale": K**-0.5 * 1.4426950408889634, "HAS_SEGMENT": segment is not None, "segment": self.segment, "count": self.count,
        }  # fmt: skip

    def launch(self, name: str, cut: table.Cut, tokens: int, block: int, **more: Any) -> None:
        from unisono_torch.kernels.window import sweep

        kernel: Any = getattr(sweep, name)
        unit, moved = self.unit, self.moved | {n: more[n] for n in ("k", "v") if n in more}
        if any(a.stride(i) % unit for a in moved.values() for i in range(3)):
            unit = 1
        strides = {f"{n[0]}{i}": a.stride(i) // unit for n, a in moved.items() for i in range(3)}
        given = {**self.shared, **self.carried, **moved, **more, **strides, "M": cut.queries, "N": cut.keys, "UNIT": unit}
        with torch.cuda.device_of(self.count):
            kernel[(self.batch * self.heads * -(-tokens // block),)](
                **{n: given[n] for n in kernel.arg_names}, num_warps=cut.warps, num_stages=cut.stages
            )


def _columns(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor count, Tensor? segment"


@torch.library.custom_op("unisono::window", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(q, k, v, keys, values, count, segment):
    o, log_sum = _forward_fake(q, k, v, keys, values, count, segment)
    if o.numel():
        call = _Call(q, k, v, keys, values, count, segment)
        call.launch("forward", call.cut.forward, call.length, call.cut.forward.queries, o=o, log_sum=log_sum)
    return o, log_sum


@_forward.register_fake
def _forward_fake(q, k, v, keys, values, count, segment):
    return v.new_empty(v.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op(
    "unisono::window_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor o, Tensor log_sum, {_INPUTS}, bool carried) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(do, o, log_sum, q, k, v, keys, values, count, segment, carried):
    """Gradients of q, k, v, and of the carried keys and values (empty where they are not asked for)."""
    dq, dk, dv, dkeys, dvalues = _backward_fake(do, o, log_sum, q, k, v, keys, values, count, segment, carried)
    if not do.numel():
        return dq, dk, dv, dkeys.zero_(), dvalues.zero_()
    call = _Call(q, k, v, keys, values, count, segment, do)
    delta, cut = torch.empty_like(log_sum), call.cut
    saved = {"log_sum": log_sum, "delta": delta}
    call.launch("of_queries", cut.of_queries, call.length, cut.of_queries.queries, o=o, dq=dq, **saved)
    call.launch("of_keys", cut.of_keys, call.length, cut.of_keys.keys, dk=dk, dv=dv, CARRIED=False, **saved)
    if carried:
        old = {"k": call.carried["keys"], "v": call.carried["values"]}
        call.launch("of_keys", cut.of_keys, call.window, cut.of_keys.keys, dk=dkeys, dv=dvalues, CARRIED=True, **saved, **old)
    return dq, dk, dv, dkeys, dvalues


@_backward.register_fake
def _backward_fake(do, o, log_sum, q, k, v, keys, values, count, segment, carried):
    dq, dk, dv = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (q, k, v))
    return dq, dk, dv, *(a.new_empty(a.shape if carried else (0,)) for a in (keys, values))


def _setup(ctx, inputs, output) -> None:
    o, log_sum = output
    ctx.mark_non_differentiable(log_sum)
    ctx.save_for_backward(o, log_sum, *inputs)


def _gradient(ctx, do, _):
    o, log_sum, *inputs = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_plain, inputs, ctx.needs_input_grad, (do,))
    carried = any(ctx.needs_input_grad[3:5])
    *found, dkeys, dvalues = _backward(do, o, log_sum, *inputs, carried)
    return *found, *((dkeys, dvalues) if carried else (None, None)), None, None


def _plain(q, k, v, keys, values, count, segment):
    """The same in plain operations, for second derivatives, which PyTorch's fused attention has not."""
    from unisono_torch.ops import window

    with sdpa_kernel(SDPBackend.MATH):
        return window.banded(q, k, v, (keys, values, count), segment)


_forward.register_autograd(_gradient, setup_context=_setup)
