"""Inside torch.autocast: what a model computes in, and what keeps its digits there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What torch.autocast casts to on `device`; None where it is off."""
    # a compiler cannot ask which devices there are (torch 2.11), but does not compile for others than these
    known = device.type in ("cpu", "cuda") if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device.type)
    if not known or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def uncast(device: torch.device) -> contextlib.AbstractContextManager:
    """A region in which torch.autocast casts nothing."""
    return contextlib.nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def exact(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` where torch.autocast casts nothing: a sum of products in 16 bits would forget what it sums."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if autocast_dtype(device) is None:
            return op(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return op(*args, **kwargs)

    return call
