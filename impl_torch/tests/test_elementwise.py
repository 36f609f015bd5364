"""Tails of elementary functions keep their digits: each slope is held to itself, not to the largest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unisono_conformance import judge, numerics
from unisono_torch.ops.elementwise import sigmoid

X = np.concatenate([-np.geomspace(0.1, 30, 25)[::-1], [0.0], np.geomspace(0.1, 30, 25)])


@pytest.mark.parametrize("how", ["eager", "func", "second"])
def test_slope_of_sigmoid(how: str) -> None:
    """σ'(x) = e / (1 + e)² with e = e^−|x|; y(1−y) is 17 % off at 15. The slope of the slope is σ' (1 − 2σ), whose terms are 1 and 2σ."""
    x = torch.tensor(X, dtype=torch.float32, requires_grad=how != "func")
    e = np.exp(-np.abs(X.astype(np.float32).astype(np.float64)))
    wanted, terms = e / (1 + e) ** 2, e / (1 + e) ** 2
    if how == "func":
        found = torch.func.vmap(torch.func.grad(sigmoid))(x)
    else:
        (found,) = torch.autograd.grad(sigmoid(x).sum(), x, create_graph=how == "second")
    if how == "second":
        (found,) = torch.autograd.grad(found.sum(), x)
        wanted, terms = wanted * (1 - 2 * np.where(X > 0, 1, e) / (1 + e)), 3 * wanted
    judge.within(found.detach().numpy().astype(np.float64), wanted, numerics.formula("float32", 1, gradient=True) * terms)
