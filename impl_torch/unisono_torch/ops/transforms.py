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
    """PyTorch's fused attention, q, k [B, H, T, K], v [B, H, T, V] → [B, H, T, V]; by matmuls under vmap and in forward mode, which it
    does not know."""
    with sdpa_kernel(SDPBackend.MATH) if transformed() and _batched_or_forward() else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, reads, is_causal=is_causal)


def _batched_or_forward() -> bool:
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    stack = functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() == functorch.TransformType.Vmap for level in stack)
