"""Context parallelism: neighbours share each sequence, and hand the state on in time and its gradient back.

Exact for every model whose state has a fixed size. A process computes its stretch of one microbatch while its neighbour computes the
next stretch of the one before, so that with A of them and C neighbours a share of A / (A + C − 1) of the time is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_tools.backends.base import Batch
from unisono_tools.backends.torch.ranks import Ranks

State = dict[str, Tensor]


def stretch(batch: Batch, ranks: Ranks) -> slice:
    """Where this process's tokens lie in each sequence."""
    length = batch.inputs.shape[1]
    if length % ranks.context:
        raise InputError(f"seq_len: {length} does not divide into context {ranks.context}; use a multiple of it")
    size = length // ranks.context
    return slice(ranks.stretch * size, (ranks.stretch + 1) * size)


def cut(batch: Batch, ranks: Ranks) -> Batch:
    """This process's stretch of each sequence; the first one starts where the batch says."""
    where = stretch(batch, ranks)

    def piece(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[:, where]

    return dataclasses.replace(
        batch,
        inputs=batch.inputs[:, where],
        targets=batch.targets[:, where],
        scored=piece(batch.scored),
        reset=piece(batch.reset),
        valid=piece(batch.valid),
        state=batch.state if ranks.stretch == 0 else None,
    )


def weight_of(batch: Batch, ranks: Ranks) -> float:
    """Which share of a microbatch's tokens lies in this process's stretch."""
    if batch.valid is None:
        return 1 / ranks.context
    return float(batch.valid[:, stretch(batch, ranks)].sum()) / max(1, int(batch.valid.sum()))


def backward(ranks: Ranks, number: int, compute: Callable[[int, State | None], Any], empty: Callable[[], State], weight: Any) -> list[Any]:
    """Gradients of `number` microbatches into `.grad` → what `compute` gave for each.

    compute: a microbatch's number, the state before this stretch (None: where its sequences start) → nats, loads, the state after it.
    empty: a state's shapes. weight: what nats are multiplied by.
    """
    before, after = ranks.rank - 1, ranks.rank + 1
    found, given = [], []
    for i in range(number):
        state = None if ranks.stretch == 0 else _received(empty(), before)
        found.append(compute(i, state))
        given.append(state)
        if ranks.stretch + 1 < ranks.context:
            _send([a.detach() for a in found[-1][2].values()], after)
    for i in reversed(range(number)):
        nats, _, end, *_ = found[i]
        roots, slopes = [nats * weight], [None]
        if ranks.stretch + 1 < ranks.context:
            ends = [a for a in end.values() if a.is_floating_point()]
            back = _receive([torch.empty_like(a) for a in ends], after)
            for a, slope in zip(ends, back, strict=True):
                if a.requires_grad:
                    roots.append(a)
                    slopes.append(slope)  # pyright: ignore[reportArgumentType]
        torch.autograd.backward(roots, slopes)  # pyright: ignore[reportArgumentType]
        start = given[i]
        if start is not None:
            floats = [a for a in start.values() if a.is_floating_point()]
            _send([torch.zeros_like(a) if a.grad is None else a.grad for a in floats], before)
    return found


def _received(shapes: State, source: int) -> State:
    arrays = _receive(list(shapes.values()), source)
    return {name: a.requires_grad_(a.is_floating_point()) for name, a in zip(shapes, arrays, strict=True)}


def _send(tensors: list[Tensor], to: int) -> None:
    """One message a dtype."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        dist.send(torch.cat([t.reshape(-1) for t in tensors if t.dtype == dtype]), to)


def _receive(like: list[Tensor], source: int) -> list[Tensor]:
    out = list(like)
    for dtype in dict.fromkeys(t.dtype for t in like):
        places = [i for i, t in enumerate(like) if t.dtype == dtype]
        flat = torch.empty(sum(like[i].numel() for i in places), dtype=dtype, device=like[places[0]].device)
        dist.recv(flat, source)
        for i, part in zip(places, flat.split([like[i].numel() for i in places]), strict=True):
            out[i] = part.view_as(like[i]).clone()
    return out
