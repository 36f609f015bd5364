"""CUDA graphs of functions that launch many small kernels: a launch takes the host several times what such a kernel takes the GPU."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from unisono_torch.ops.transforms import transformed

_Found = TypeVar("_Found")
CAPACITY = 16  # graphs; each keeps its memory
_graphs: collections.OrderedDict[Any, _Graph] = collections.OrderedDict()
_lock = threading.Lock()


def captured(work: Callable[[], _Found], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, _Found]:
    """A graph of what `work` launches on the current device, which is run once before, and what it returns. pool: of memory, as
    `torch.cuda.graph_pool_handle` gives one, for graphs that are never replayed beside each other."""
    stream, home = torch.cuda.Stream(), torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    stream.wait_stream(home)
    with torch.cuda.stream(stream):  # once without a graph, in which libraries could not set themselves up
        work()
    home.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # a workspace of cuBLAS is this graph's own, in its memory: graphs that share one cannot run beside each other
    torch._C._cuda_clearCublasWorkspaces()
    # PyTorch's own stream for this is one of the device of the first graph
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            found = work()
    except BaseException:
        torch.cuda.set_stream(home)
        _abandon(home.device_index, pool)
        raise
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # nor beside work of a stream that took the graph's
    return graph, found


def _abandon(device: int, pool: Any) -> None:
    """End what PyTorch 2.11 leaves open of a recording that the driver ended: its allocator would free nothing any more, and the device's
    random numbers wait for a recording to end well."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            torch.zeros(1, device=f"cuda:{device}")


class _Graph:
    """What `function` launches on tensors like `inputs`, with tensors of its own in their place: none of torch.inference_mode's, so that
    it can be replayed inside that mode and outside."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], settings: tuple, inputs: list[Tensor | None]) -> None:
        own = [None if a is None else torch.empty(a.shape, dtype=a.dtype, device=a.device).copy_(a) for a in inputs]
        self.inputs = [a for a in own if a is not None]
        self.graph, self.outputs = captured(lambda: function(*settings, *own))

    def __call__(self, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, (a for a in inputs if a is not None), strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(a.clone() for a in self.outputs)


def capturing(on: Tensor) -> bool:
    """Whether a CUDA graph is being made of what is launched now, where no value can be looked at."""
    return on.is_cuda and torch.cuda.is_current_stream_capturing()


def replayed(function: Callable[..., tuple[Tensor, ...]], settings: tuple, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """function(*settings, *inputs), on a GPU as a graph that is kept for the next call with equal settings and such tensors.

    `function` must depend on nothing else. It is not differentiated. The first input is a tensor.
    """
    on = inputs[0]
    assert on is not None
    if not on.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled() or transformed() or torch.is_autocast_enabled("cuda"):
        return function(*settings, *inputs)
    if on.numel() == 0 or torch.cuda.is_current_stream_capturing():  # of no rows nothing is launched, and no graph made
        return function(*settings, *inputs)
    with torch.cuda.device(on.device), torch.inference_mode(False), torch.no_grad(), _lock:
        shapes = tuple(None if a is None else (a.shape, a.dtype) for a in inputs)
        # a graph's tensors are written and read in the order of one stream
        key = (function, settings, shapes, on.device, torch.cuda.current_stream().cuda_stream)
        if key not in _graphs:
            _graphs[key] = _Graph(function, settings, list(inputs))
            if len(_graphs) > CAPACITY:
                _graphs.popitem(last=False)
        _graphs.move_to_end(key)
        return _graphs[key](list(inputs))
