from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from unisono_conformance.judging import truth


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-property", action="store_true", help="mistakes face every property, not only the one aimed at them")
    parser.addoption("--truth-in", type=Path, help="folder that keeps what the spec says: --truth of the court")


@pytest.fixture(scope="session", autouse=True)
def kept(request: pytest.FixtureRequest) -> Iterator[None]:
    truth.keep_in(request.config.getoption("--truth-in"))
    yield
    truth.keep_in(None)


@pytest.fixture
def every_property(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--every-property"))
