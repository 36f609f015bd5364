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


class Graphed:
    """`objective(arguments)` and its gradient, times a weight."""

    def __init__(self, objective: Callable[..., Any], parameters: Sequence[Tensor]) -> None:
        self.objective, self.parameters = objective, parameters
        self.graphs: dict[Any, _Graph] = {}
        self.sums: list[Tensor | None] = []
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, arguments: dict[str, Any], weight: float | Tensor, first: bool, last: bool) -> Any:
        """What the objective gives, in memory of its own; gradients in `.grad`, after the last of several microbatches their sums."""
        leaves, shape = trees.tree_flatten(arguments)
        kind = str(shape), tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in leaves)
        if kind not in self.graphs and len(self.graphs) == KINDS:
            found, gradients = self._backward(arguments, weight)
        else:
            if kind not in self.graphs:
                self.graphs[kind] = self._recorded(leaves, shape, weight)
            found, gradients = self.graphs[kind](leaves, weight)
        if not (first and last):
            gradients = self._added(gradients, first)
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient if last else None
        return trees.tree_map_only(Tensor, torch.clone, found)

    def _backward(self, arguments: dict[str, Any], weight: float | Tensor) -> tuple[Any, list[Tensor | None]]:
        for p in self.parameters:
            p.grad = None
        found = self.objective(arguments)
        (found[0] * weight).backward()
        gradients = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return trees.tree_map_only(Tensor, torch.detach, found), gradients

    def _recorded(self, leaves: list[Any], shape: Any, weight: float | Tensor) -> _Graph:
        own = [a.clone() if isinstance(a, Tensor) else a for a in leaves]
        arguments = trees.tree_unflatten(own, shape)
        # of the loss's dtype, in which a number of the host's would multiply it
        found, _ = self._backward(arguments, weight)
        factor = torch.empty_like(found[0]).fill_(weight)
        torch.cuda.empty_cache()  # what this pass leaves, a graph's stream could not take: it would need as much again
        try:
            graph, kept = captured(lambda: self._backward(arguments, factor), self.pool)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise InputError(f"cuda_graphs: true, and a step of this model cannot be recorded ({why}); leave it out") from error
        return _Graph(graph, [*(a for a in own if isinstance(a, Tensor)), factor], kept)

    def _added(self, gradients: list[Tensor | None], first: bool) -> list[Tensor | None]:
        """The sums with those of the microbatches before, apart from what the next replay writes."""
        before = [None] * len(gradients) if first else self.sums
        self.sums = [a if b is None else b.clone() if a is None else a.add_(b) for a, b in zip(before, gradients, strict=True)]
        return self.sums


class _Graph:
    def __init__(self, graph: Any, inputs: list[Tensor], found: tuple[Any, list[Tensor | None]]) -> None:
        self.graph, self.inputs, self.found = graph, inputs, found

    def __call__(self, leaves: list[Any], weight: float | Tensor) -> tuple[Any, list[Tensor | None]]:
        for own, given in zip(self.inputs, (a for a in leaves if isinstance(a, Tensor)), strict=False):
            own.copy_(given)
        self.inputs[-1].fill_(weight)
        self.graph.replay()
        return self.found
