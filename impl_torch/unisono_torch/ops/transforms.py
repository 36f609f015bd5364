"""What ops with a backward of their own need: a second derivative, and to know when autograd is not the only one that asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is at work, which knows plain operations only."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def again(function: Callable[..., Any], inputs: Sequence[Any], needed: Sequence[bool], gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    """The gradients of function(*inputs), plain operations, so that they can be differentiated in their turn; None where not `needed`.

    For a backward under create_graph=True, which forgets how its result depends on what it has saved unless it says so.
    """
    # views, so that what one input owes to another upstream is not counted twice
    inputs = [a.view_as(a) if isinstance(a, Tensor) else a for a in inputs]
    wanted = [a for a, need in zip(inputs, needed, strict=True) if need]
    outputs = function(*inputs)
    pairs = zip(outputs if isinstance(outputs, tuple) else (outputs,), gradients, strict=True)
    reached = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
    found = iter(torch.autograd.grad([o for o, _ in reached], wanted, [g for _, g in reached], create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def attention(q: Tensor, k: Tensor, v: Tensor, reads: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """PyTorch's fused attention, q, k [B, H, T, K], v [B, H, T, V] → [B, H, T, V]; by matmuls under vmap, in forward mode and where it
    shall be differentiated twice, which it does not know."""
    if transformed():
        with sdpa_kernel(SDPBackend.MATH) if _beyond_one_gradient() else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, reads, is_causal=is_causal)
    o = F.scaled_dot_product_attention(q, k, v, reads, is_causal=is_causal)
    return o if torch.compiler.is_compiling() or not o.requires_grad else _Twice.apply(o, q, k, v, reads, is_causal)


class _Twice(torch.autograd.Function):
    """o as it is. Its gradient is fused attention's own, but where it is differentiated in its turn: there it is that of matmuls."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, q: Tensor, k: Tensor, v: Tensor, reads: Tensor | None, is_causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v, reads)
        ctx.is_causal = is_causal
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():  # of create_graph=True
            return *grads, None, None, None, None, None
        *given, reads = ctx.saved_tensors

        def by_matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v, reads, is_causal=ctx.is_causal)

        return None, *again(by_matmuls, given, ctx.needs_input_grad[1:4], grads), None, None


def _beyond_one_gradient() -> bool:
    """Whether the transforms at work ask for more than one gradient of plain calls."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    kinds = [level.key() for level in functorch.get_interpreter_stack() or ()]
    return forward_ad._current_level >= 0 or kinds != [functorch.TransformType.Grad]
