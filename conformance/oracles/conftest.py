"""`agree` compares the spec with an implementation that no one here wrote; the table of differences closes the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract.files import write_bytes

ROWS: list[dict] = []
B, T, H, K, V = 2, 64, 3, 8, 16


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def qkv(random) -> tuple[np.ndarray, ...]:
    return tuple(random.normal(size=(B, T, H, width)) for width in (K, K, V))


@pytest.fixture
def agree() -> Callable[..., None]:
    """Fail unless `ours` and `theirs` differ by rounding in `dtype`, in which the oracle computes, through `length` terms."""

    def check(what: str, oracle: str, ours: np.ndarray, theirs: np.ndarray, dtype: str, length: int) -> None:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape
        largest = np.abs(ours).max()
        assert largest > 0
        difference = float(np.abs(ours - theirs).max() / largest)
        budget = numerics.OTHER_MACHINE * numerics.formula(dtype, length)
        ROWS.append({"what": what, "oracle": oracle, "dtype": dtype, "difference": difference, "budget": budget})
        assert difference <= budget, f"{what}: {difference:.2e} of the largest value, {budget:.2e} is allowed"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    terminalreporter.line("| what | oracle | computes in | largest difference | budget |\n|---|---|---|---|---|")
    for row in ROWS:
        cells = (row["what"], row["oracle"], row["dtype"], f"{row['difference']:.1e}", f"{row['budget']:.1e}")
        terminalreporter.line(f"| {' | '.join(cells)} |")
    write_bytes(Path("build/reports/oracles.json"), json.dumps(ROWS, indent=1, ensure_ascii=False).encode())
