"""The kernels' tests run in Triton's interpreter, or with `--device cuda` on a GPU (more and longer cases)."""

from __future__ import annotations

import contextlib
import os
import sys

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "drawn" in metafunc.fixturenames:
        from .reference import LARGE, SMALL

        cases = SMALL if chosen_device(metafunc.config) == "cpu" else SMALL + LARGE
        metafunc.parametrize("drawn", cases, ids=str)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return chosen_device(request.config)
