from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-property", action="store_true", help="mistakes face every property, not only the one aimed at them")


@pytest.fixture
def every_property(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--every-property"))
