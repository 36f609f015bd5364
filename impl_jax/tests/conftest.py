"""What the tests of this room share: how near is near, and a generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from unisono_conformance import judge, numerics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def close() -> Callable[..., None]:
    """Hold one array to another: by `limit` of the largest value, in float64 by what two orders of a sum of 64 terms differ by, in
    models that stack a handful of such sums, none of which magnifies an error tenfold."""

    def check(found: object, truth: object, limit: float | None = None) -> None:
        limit = numerics.forms(terms=64, ops=10, spread=1) if limit is None else limit
        judge.same(np.asarray(found, np.float64), np.asarray(truth, np.float64), limit)

    return check
