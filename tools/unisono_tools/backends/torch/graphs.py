"""Gradients replayed as CUDA graphs: what a batch's forward and backward launch is recorded once, and costs the host one launch since.

The same kernels in the same order, so the same bits as without. A graph's tensors have fixed places: what a step is given is copied into
them, and its gradients are read where they lie until the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as trees
from unisono_spec.contract import InputError
from unisono_torch.ops.graphs import captured

KINDS = 4  # of batches, each a graph that keeps its memory; a batch of another kind is computed without one
ROOM = 4  # times the parameters' bytes that a graph leaves free: an average's update and a reader of it take two
SCARCE = "the GPU has too little memory"


def unfit(device: torch.device, processes: int) -> str | None:
    """Why no step of a trainer can be recorded, whatever its model; None where one can."""
    if device.type != "cuda":
        return f"on {device.type}"
    if processes > 1:
        return f"with {processes} processes"
    if device.index not in (None, torch.cuda.current_device()):
        return f"on {device}, which is not this process's current GPU"
    return None


class Graphed:
    """`objective(arguments)` and its gradient, times a weight. A kind of batch is recorded when it comes for the second time.

    must: raise InputError where a step cannot be recorded. Otherwise what cannot be is computed without graphs from then on, and `notes`
    says so, once: `why` is the reason.
    """

    def __init__(self, objective: Callable[..., Any], parameters: Sequence[Tensor], must: bool = True) -> None:
        self.objective, self.parameters, self.must = objective, parameters, must
        self.graphs: dict[Any, _Graph] = {}
        self.factors: dict[Any, Tensor] = {}  # what multiplies the loss, of its dtype, by the kind of batch that came once
        self.sums: list[Tensor | None] = []
        self.notes: list[str] = []
        self.why: str | None = None
        self.pool = _pool()

    def __call__(self, arguments: dict[str, Any], weight: float | Tensor, first: bool, last: bool) -> Any:
        """What the objective gives, in memory of its own; gradients in `.grad`, after the last of several microbatches their sums."""
        leaves, shape = trees.tree_flatten(arguments)
        kind = str(shape), tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in leaves)
        if self.why is None and kind in self.factors and kind not in self.graphs and len(self.graphs) < KINDS:
            self._record(kind, leaves, shape, weight)
        if kind in self.graphs:
            found, gradients = self.graphs[kind](leaves, weight)
        else:
            found, gradients = self._computed(arguments, weight)
            if self.why is None and len(self.graphs) < KINDS:
                self.factors[kind] = torch.empty_like(found[0])
        if not (first and last):
            gradients = self._added(gradients, first)
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient if last else None
        return trees.tree_map_only(Tensor, torch.clone, found)

    def release(self) -> bool:
        """Give back what the graphs hold; they are recorded anew. Whether there were any."""
        if not self.graphs:
            return False
        if self.pool is not None:
            torch.cuda.synchronize()
        self.graphs.clear()
        torch.cuda.empty_cache()
        self.pool = _pool()  # the old one lives as long as the last gradients do
        return True

    def _computed(self, arguments: dict[str, Any], weight: float | Tensor) -> tuple[Any, list[Tensor | None]]:
        try:
            return self._backward(arguments, weight)
        except torch.OutOfMemoryError:
            if self.must or not self.graphs:
                raise
        self._give_up(SCARCE)
        return self._backward(arguments, weight)

    def _backward(self, arguments: dict[str, Any], weight: float | Tensor) -> tuple[Any, list[Tensor | None]]:
        for p in self.parameters:
            p.grad = None
        found = self.objective(arguments)
        (found[0] * weight).backward()
        gradients = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return trees.tree_map_only(Tensor, torch.detach, found), gradients

    def _record(self, kind: Any, leaves: list[Any], shape: Any, weight: float | Tensor) -> None:
        try:
            self.graphs[kind] = self._recorded(leaves, shape, self.factors[kind].fill_(weight))
            why = SCARCE if self._scarce() else None
        except RuntimeError as error:
            why = SCARCE if isinstance(error, torch.OutOfMemoryError) else str(error).strip().splitlines()[0]
            if self.must:
                raise InputError(f"cuda_graphs: true, and a step of this model cannot be recorded ({why}); leave it out") from error
        if why is not None and not self.must:
            self._give_up(why)

    def _recorded(self, leaves: list[Any], shape: Any, factor: Tensor) -> _Graph:
        own = [a.clone() if isinstance(a, Tensor) else a for a in leaves]
        arguments = trees.tree_unflatten(own, shape)
        torch.cuda.empty_cache()  # what other passes leave, a graph's stream could not take: it would need as much again
        graph, kept = captured(lambda: self._backward(arguments, factor), self.pool)
        return _Graph(graph, [*(a for a in own if isinstance(a, Tensor)), factor], kept)

    def _scarce(self) -> bool:
        """Whether graphs leave the rest of a step too little."""
        if not any(p.is_cuda for p in self.parameters):
            return False
        return torch.cuda.mem_get_info()[0] < ROOM * sum(p.nbytes for p in self.parameters)

    def _give_up(self, why: str) -> None:
        self.release()
        torch.cuda.empty_cache()  # of what could not be recorded, too
        self.factors.clear()
        self.why = why
        self.notes.append(f"cuda_graphs: auto, and from here on without: {why}")

    def _added(self, gradients: list[Tensor | None], first: bool) -> list[Tensor | None]:
        """The sums with those of the microbatches before, apart from what the next replay writes."""
        before = [None] * len(gradients) if first else self.sums
        self.sums = [a if b is None else b.clone() if a is None else a.add_(b) for a, b in zip(before, gradients, strict=True)]
        return self.sums


def _pool() -> Any:
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


class _Graph:
    def __init__(self, graph: Any, inputs: list[Tensor], found: tuple[Any, list[Tensor | None]]) -> None:
        self.graph, self.inputs, self.found = graph, inputs, found

    def __call__(self, leaves: list[Any], weight: float | Tensor) -> tuple[Any, list[Tensor | None]]:
        for own, given in zip(self.inputs, (a for a in leaves if isinstance(a, Tensor)), strict=False):
            own.copy_(given)
        self.inputs[-1].fill_(weight)
        self.graph.replay()
        return self.found
