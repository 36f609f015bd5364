"""Inside torch.autocast: what a model computes in, and what keeps its digits there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unisono_torch.ops.transforms import transformed


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
    """`op` where torch.autocast casts nothing: a sum of products in 16 bits would forget what it sums. Nor do its first derivatives, in
    eager mode, where they are asked for inside the region as well.
    """

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if autocast_dtype(device) is None:
            return op(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            found = op(*args, **kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed():
            _uncast_back(found, (args, kwargs), device.type)
        return found

    return call


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(tuple(tree.values()))
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)


def _uncast_back(outputs: Any, inputs: Any, kind: str) -> None:
    """torch.autocast of `kind` off on the way back from `outputs` to `inputs`; costs something only where it is on there."""
    before = {a.grad_fn for a in _tensors(inputs)}
    for node in {a.grad_fn for a in _tensors(outputs)} - before:
        if node is not None:
            node.register_prehook(functools.partial(_first_uncast, kind, [behind for behind, _ in node.next_functions], before))


def _first_uncast(kind: str, ahead: list[Any], before: set[Any], gradients: Any) -> None:
    if not torch.is_autocast_enabled(kind):
        return
    _one_uncast(kind)
    seen = {*before, None}
    while ahead:  # nothing is left for a second way back, which finds these hooks
        node = ahead.pop()
        if node not in seen and node.next_functions:  # a leaf has none
            seen.add(node)
            node.register_prehook(functools.partial(_one_uncast, kind))
            ahead.extend(behind for behind, _ in node.next_functions)


def _one_uncast(kind: str, gradients: Any = None) -> None:
    torch.set_autocast_enabled(kind, False)  # autograd gives the next node the state that its caller had
