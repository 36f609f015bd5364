"""What the tests of this room share: how near is near, and a generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

# Two orders of one sum of n ≤ 64 float64 terms differ by at most 2n roundings of the sum of magnitudes; the models here stack
# a handful of such sums, none of which magnifies an error tenfold.
ROUNDOFF = 2 * 64 * 10 * np.finfo(np.float64).eps


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def close() -> Callable[..., None]:
    """Assert equal shapes, and a largest difference within `tolerance` of the largest magnitude."""

    def check(found: object, truth: object, tolerance: float = ROUNDOFF) -> None:
        a, b = np.asarray(found, np.float64), np.asarray(truth, np.float64)
        assert a.shape == b.shape
        if a.size:
            assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1.0)

    return check
