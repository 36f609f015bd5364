"""A recording that fails leaves the process as it was: told by a CUDA that only writes down what it is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from unisono_torch.ops import graphs


@pytest.mark.parametrize("open_still", [True, False])
def test_a_recording_that_fails_is_ended(monkeypatch, open_still):
    """open_still: PyTorch's own end of it stopped half-way, as in 2.11; later ones close the pool themselves."""
    asked: list[Any] = []
    home = SimpleNamespace(name="home", device_index=3, wait_stream=lambda other: None)

    @contextlib.contextmanager
    def recording(graph: Any, **options: Any) -> Iterator[None]:
        asked.append("record")
        yield

    def ended(device: int, pool: Any) -> None:
        if not open_still:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        asked.append(("end", device, pool))

    cuda = {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: home,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: asked.append(stream.name),
        "graph_pool_handle": lambda: (0, 7),
        "CUDAGraph": object,
        "graph": recording,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: asked.append("clear"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *given: asked.append(("release", *given)))
    monkeypatch.setattr(torch, "zeros", lambda *given, **more: None)

    def work() -> None:
        if "record" in asked:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.captured(work)
    closed = [("end", 3, (0, 7)), ("release", 3, (0, 7)), "record"] if open_still else []
    assert asked == ["clear", "record", "home", *closed, "clear"]
