"""The kernels' tests run in Triton's interpreter, or with `--device cuda` on a GPU (more and longer cases)."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from typing import Any

import numpy as np
import pytest


def chosen_device(config: pytest.Config) -> str:
    return config.getoption("device", None) or "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # the court's plugin has it too
        parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the kernels run")


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads this when it is imported
    if chosen_device(config) == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise pytest.UsageError("triton was imported before the interpreter could be chosen; set TRITON_INTERPRET=1")
        os.environ["TRITON_INTERPRET"] = "1"
    if os.environ.get("TRITON_INTERPRET") == "1":
        from unisono_torch.kernels import interpreter

        interpreter.install()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "drawn" in metafunc.fixturenames:
        from .reference import LARGE, SMALL

        cases = SMALL if chosen_device(metafunc.config) == "cpu" else SMALL + LARGE
        metafunc.parametrize("drawn", cases, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of what the interpreter launches are none of a GPU."""
    if chosen_device(config) != "cpu":
        gone = [item for item in items if "interpreter" in getattr(item, "fixturenames", ())]
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=gone)


@pytest.fixture
def interpreter() -> None:
    """Asked for by what is tested of Triton's interpreter alone."""


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return chosen_device(request.config)


@pytest.fixture(autouse=True)
def _greater_numbers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a number and a NaN a GPU's maximum and minimum are the number; the interpreter's would be NaN."""
    if device == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            monkeypatch.setattr(InterpreterBuilder, name, functools.partialmethod(InterpreterBuilder.binary_op, op=function))


@pytest.fixture(autouse=True)
def _nearest_bfloat16(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU rounds float32 to the nearest bfloat16; the interpreter would cut digits off."""
    if device == "cpu":
        import torch
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        cast = InterpreterBuilder.cast_impl

        def rounded(self: InterpreterBuilder, source: TensorHandle, kind: Any) -> TensorHandle:
            if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
                return cast(self, source, kind)
            nearest = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16)
            return TensorHandle(nearest.numpy(), kind.scalar)

        monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture(autouse=True)
def _one_launch_at_a_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's state is the process's: launches of several threads, which a GPU takes, would meet in it."""
    if device == "cpu":
        from triton.runtime.interpreter import GridExecutor

        lock, call = threading.Lock(), GridExecutor.__call__

        def locked(self: GridExecutor, *arguments: Any, **named: Any) -> None:
            with lock:
                call(self, *arguments, **named)

        monkeypatch.setattr(GridExecutor, "__call__", locked)


@pytest.fixture
def grids(device: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grids of the kernels that the interpreter launches."""
    launched: list[tuple[int, ...]] = []
    if device == "cpu":
        from triton.runtime.interpreter import GridExecutor

        call = GridExecutor.__call__

        def recorded(self: GridExecutor, *arguments: Any, **named: Any) -> None:
            launched.append(self.grid)
            call(self, *arguments, **named)

        monkeypatch.setattr(GridExecutor, "__call__", recorded)
    return launched
