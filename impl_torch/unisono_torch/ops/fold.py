"""The recurrent form of every op: a fold of its `step`. Parallel forms do not use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from unisono_spec.contract import InputError

Arrays = TypeVar("Arrays", Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor])


def fold(
    step: Callable[..., tuple[Tensor, Any]], inputs: Sequence[Tensor], initial_state: Any, reset: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Any]:
    """inputs [B, T, …]: step(*inputs at t, state, reset at t, valid at t) → outputs [B, T, …], final state."""
    check_length(inputs[0])
    length = inputs[0].shape[1]
    state, out = initial_state, []
    # unbind, since the gradient of each x[:, t] would be as long as x
    marks = ([None] * length if m is None else m.unbind(1) for m in (reset, valid))
    for *x, reset_t, valid_t in zip(*(x.unbind(1) for x in inputs), *marks, strict=True):
        o, state = step(*x, state, reset_t, valid_t)
        out.append(o)
    return torch.stack(out, 1), state


def masked(valid: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    """inputs [..., …], zero where `valid` [...] is false, so that a NaN there reaches neither outputs nor gradients."""
    if valid is None:
        return inputs
    return tuple(torch.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - valid.ndim)), x, 0) for x in inputs)


def restarted(reset: Tensor | None, state: Arrays) -> Arrays:
    """A state [B, …], or its parts, as the first token of `reset` [B, T] finds it: zeros where it is reset, and a NaN is forgotten."""
    if reset is None:
        return state
    several = isinstance(state, (tuple, list))
    parts = masked(~reset[:, 0], *(state if several else (state,)))
    return parts if several else parts[0]  # pyright: ignore[reportReturnType]


def check_length(x: Tensor) -> None:
    """Raises InputError where x [B, T, …] has no token."""
    if x.shape[1] == 0:
        raise InputError("T is 0; give at least one token")
