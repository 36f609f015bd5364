"""One test an item: a property of a case, in one dtype and form. `plugin` makes the items from the implementation's capabilities."""

from __future__ import annotations

import pytest

from unisono_conformance.suite.explore import explore


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.config.pluginmanager.hasplugin("unisono-judgement"):
        raise pytest.UsageError(
            "whom to judge? Run: python -m pytest -p unisono_conformance.plugin --pyargs unisono_conformance --impl NAME"
        )


def test_property(item, profile, ledger) -> None:
    explore(item, profile, ledger)
