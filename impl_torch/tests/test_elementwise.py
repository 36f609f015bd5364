"""Tails of elementary functions keep their digits: each value, slope and curvature is held to itself, not to the largest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unisono_conformance import tails
from unisono_torch.ops import elementwise
from unisono_torch.ops.features import elu1

NAMES = tuple(tails.FUNCTIONS)


def function(name: str):
    return elu1 if name == "elu1" else getattr(elementwise, name)


def held(name: str, found: torch.Tensor, x: np.ndarray, dtype: str, order: int = 0) -> None:
    tails.hold(name, found.detach().double().numpy(), x, dtype, order)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_tails(name: str, dtype: str) -> None:
    """F.gelu(−5) is 17 % off in float32, its tanh form 30 %; y(1−y), 1−y² and what torch derives twice have no digits where y is near 1."""
    points, f = np.concatenate([tails.points(name, dtype), tails.limits(dtype)]), function(name)
    x = torch.tensor(points.astype(np.float64)).to(getattr(torch, dtype))
    held(name, f(x), points, dtype)
    x.requires_grad_()
    y = f(x)
    held(name, y, points, dtype)
    (slope,) = torch.autograd.grad(y.sum(), x)
    held(name, slope, points, dtype, 1)
    if dtype in ("float64", "float32"):
        (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        held(name, slope, points, dtype, 1)
        held(name, torch.autograd.grad(slope.sum(), x)[0], points, dtype, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("name", NAMES)
def test_tails_under_transforms(name: str) -> None:
    points, f = np.concatenate([tails.points(name, "float32"), tails.limits("float32")]), function(name)
    x = torch.tensor(points)
    slope = torch.func.grad(f)
    held(name, torch.func.vmap(f)(x), points, "float32")
    held(name, torch.func.vmap(slope)(x), points, "float32", 1)
    held(name, torch.func.vmap(torch.func.grad(slope))(x), points, "float32", 2)
    held(name, torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], points, "float32", 1)


@pytest.mark.parametrize("name", NAMES)
def test_slopes_at_zero_and_far_away(name: str) -> None:
    """No branch is left out at 0, and none of e^±x makes a NaN."""
    f = function(name)
    x = torch.tensor([0.0, 1e-30, -1000.0, 1000.0], requires_grad=True)
    slopes = [torch.autograd.grad(f(x).sum(), x)[0], torch.func.vmap(torch.func.grad(f))(x.detach())]
    for slope in slopes:
        assert torch.isfinite(slope).all()
    assert torch.equal(slopes[0][:2], slopes[1][:2])


def test_norms_are_wide_and_lose_no_digits_to_a_shared_part() -> None:
    """To the last bit: numbers of 16 bits as float32, and whole ones beside 4096, of exact sums, as without it."""
    x, weight, bias = torch.arange(64) - 31, torch.linspace(0.5, 1.5, 64), torch.linspace(-1, 1, 64)
    x[-1] += 32  # their mean is 1
    norms = (lambda x, w, b: elementwise.rms_norm(x, w)), elementwise.layer_norm
    for norm in norms:
        narrow = [a.bfloat16() for a in (x, weight, bias)]
        y = norm(*narrow)
        assert y.dtype == torch.float32
        assert torch.equal(y, norm(*(a.float() for a in narrow)))
    assert torch.equal(elementwise.layer_norm(x + 4096.0, weight, bias), elementwise.layer_norm(x.float(), weight, bias))


def test_a_norm_of_large_rows_is_that_of_small_ones() -> None:
    """Powers of two scale a row, its norm's slope and nothing else, though float32 does not hold the large one's squares; ε is that of
    small ones."""
    x, weight, bias = torch.arange(64) % 7 - 2.5, torch.linspace(0.5, 1.5, 64), torch.linspace(-1, 1, 64)

    def found(scale: float, large: bool) -> tuple[torch.Tensor, ...]:
        given = (x * scale).requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
        y = elementwise.layer_norm(*given, large=large)
        return y, *torch.autograd.grad(y, given, torch.linspace(1, 2, 64))

    for scale in (1.0, 1 / 512, 0.0):
        assert all(map(torch.equal, found(scale, True), found(scale, False)))
    y, slope, *others = found(2.0**90, True)
    usual, its, *those = found(2.0**30, False)
    assert torch.equal(slope * 2.0**60, its)
    assert all(map(torch.equal, (y, *others), (usual, *those)))


def test_one_row_of_weights_compiled_keeps_its_products() -> None:
    """(1 + 1/128)² has a digit that bfloat16 has not: of 512 such squares less 520, 1/32 is left, exact in float32 in any order."""
    x, weight = (torch.full((1, 513), 1 + 1 / 128, dtype=torch.bfloat16) for _ in range(2))
    x[0, -1], weight[0, -1] = -520, 1
    y = torch.compile(elementwise.linear, backend="eager")(x, weight)
    assert y.dtype == torch.bfloat16
    assert float(y) == 1 / 32
