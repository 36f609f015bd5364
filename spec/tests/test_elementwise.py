"""Tails of functions without memory keep their digits; slopes by the complex step, which loses none."""

from __future__ import annotations

import numpy as np
import pytest
from unisono_conformance import numerics, tails
from unisono_spec.ops import elementwise, features

WRITTEN = [name for name in tails.FUNCTIONS if hasattr(elementwise, name) or hasattr(features, name)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", WRITTEN)
def test_tails(name: str, dtype: str) -> None:
    x, f = tails.points(name, dtype), getattr(elementwise, name, None) or getattr(features, name)
    if dtype == "float64":
        x = np.concatenate([x, tails.limits("float32").astype(dtype)])
    found = f(x)
    assert found.dtype == x.dtype
    tails.hold(name, found, x, dtype)
    if dtype == "float32":
        return  # a complex step in complex64 would fall below the smallest number
    step = numerics.STEP
    moved = f(x + 1j * step)
    tails.hold(name, np.real(moved), x, dtype)
    tails.hold(name, np.imag(moved) / step, x, dtype, 1)
