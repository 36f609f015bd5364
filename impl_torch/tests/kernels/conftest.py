"""The kernels' tests run in Triton's interpreter, or with `--device cuda` on a GPU (more and longer cases)."""

from __future__ import annotations

import os
import sys

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads this when it is imported
    if config.getoption("device", "cpu") == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise pytest.UsageError("triton was imported before the interpreter could be chosen; set TRITON_INTERPRET=1")
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device", "cpu")
