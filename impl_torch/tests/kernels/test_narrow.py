"""Products of few columns in all their digits: values and gradients against float64, layouts, tracing, second derivatives."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_torch.kernels import narrow as kernels
from unisono_torch.kernels.narrow import narrow, operator, serves
from unisono_torch.layers.basic import FullLinear
from unisono_torch.ops import elementwise


def inputs(rows: int, into: int, out: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    made = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=made) for shape in ((2, rows, into), (out, into), (out,)))
    return [x.to(dtype).to(device), weight.to(device), bias.to(device)]


def differentiate(function, given: list[Tensor], biased: bool = True) -> list[Tensor]:
    leaves = [a.detach().requires_grad_() for a in given]
    y = function(*leaves[:2], leaves[2] if biased else None)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).sin().reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves[: 2 + biased], upstream)]


def exactly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias)


@pytest.mark.parametrize(("rows", "into", "out"), [(35, 9, 37), (16, 48, 16), (1, 1, 1), (250, 64, 20)])
def test_values_and_gradients(rows: int, into: int, out: int, device: str) -> None:
    given = inputs(rows, into, out, torch.bfloat16, device)
    for biased in (True, False):
        found = differentiate(narrow, given, biased)
        assert [a.dtype for a in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float32][: 3 + biased]
        wanted = differentiate(exactly, [a.double() for a in given], biased)
        for a, b in zip(found, wanted, strict=True):
            kept = str(a.dtype).removeprefix("torch.")
            limit = numerics.rounding("float32", 2**8) + (numerics.rounding(kept, 1) if a.dtype != torch.float32 else 0)
            judge.same(a.double().cpu(), b.cpu(), limit=limit)


def test_digits_of_weights_beyond_those_of_x(device: str) -> None:
    x, weight, bias = inputs(20, 48, 24, torch.bfloat16, device)
    low = numerics.rounding("bfloat16", 1) * weight / 64  # nothing of a bfloat16 beside 1
    whole, alone = (narrow(x, a, bias).double() for a in (1 + low, torch.ones_like(low)))
    judge.same((whole - alone).cpu(), (x.double() @ ((1 + low).double() - 1).mT).cpu(), limit=numerics.rounding("float32", 2**17))


def test_digits_of_what_goes_back(device: str) -> None:
    """Of one row of powers of two, of which W's gradient is a copy."""
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.bfloat16, device=device)
    weight, dy = (torch.randn(7, n, generator=torch.Generator().manual_seed(n)).to(device) for n in (3, 1))
    leaf = weight.requires_grad_()
    (found,) = torch.autograd.grad(narrow(x, leaf, None), leaf, dy.mT)
    assert torch.equal(found, dy * x.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("which", [0, 1])
def test_an_infinite_factor_is_infinite(which: int, device: str) -> None:
    given = inputs(20, 48, 24, torch.bfloat16, device)
    given[which][..., 3, 5] = -torch.inf
    given[which][..., 4, 6] = torch.nan
    found, wanted = (f(*given).double() for f in (narrow, exactly))
    assert found.isinf().any()
    assert torch.equal(found.nan_to_num(1, 2, 3) * ~found.isfinite(), wanted.nan_to_num(1, 2, 3) * ~wanted.isfinite())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("which", [0, 1, 3])
def test_an_infinite_factor_on_the_way_back(which: int, device: str) -> None:
    """Of x, of W, of y's gradient, whose parts are NaN: what plain operations say, and no more of it than they do."""
    x, weight, bias = inputs(20, 24, 24, torch.bfloat16, device)
    given = [x, weight, bias, torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(5)).to(device)]
    weight[7] = 1  # of which a bfloat16 leaves nothing
    given[which][..., 3, 5], given[which][..., 4, 6], given[which][..., 7, 9] = -torch.inf, torch.nan, torch.inf

    def gradients(function) -> list[Tensor]:
        leaves = [a.clone().requires_grad_() for a in given[:3]]
        return [a.double() for a in torch.autograd.grad(function(*leaves), leaves, given[3])]

    for found, wanted in zip(gradients(narrow), gradients(exactly), strict=True):
        assert torch.equal(found.nan_to_num(1, 2, 3) * ~found.isfinite(), wanted.nan_to_num(1, 2, 3) * ~wanted.isfinite())
    assert any(a.isinf().any() for a in gradients(narrow))


def test_the_same_bits_twice_and_from_columns_of_a_wider_array(device: str) -> None:
    x, weight, bias = inputs(40, 9, 21, torch.bfloat16, device)
    first = differentiate(narrow, [x, weight, bias])
    wider = torch.cat([x, x], -1)[..., :9]
    turned = torch.stack([weight, weight], -1)[..., 0]
    for again in ([x, weight, bias], [wider, turned, torch.stack([bias, bias], -1)[..., 0]], [x.mT.contiguous().mT, weight, bias]):
        assert all(torch.equal(a, b) for a, b in zip(differentiate(narrow, again), first, strict=True))


@pytest.mark.parametrize(("rows", "into", "out"), [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 3)])
def test_nothing_to_multiply(rows: int, into: int, out: int, device: str) -> None:
    given = inputs(rows, into, out, torch.bfloat16, device)
    for biased in (True, False):
        for found, wanted in zip(differentiate(narrow, given, biased), differentiate(exactly, given, biased), strict=True):
            judge.same(found.float().cpu(), wanted.float().cpu(), limit=numerics.rounding("float32", 2**8))


def test_the_operator_can_be_traced(device: str) -> None:
    given = inputs(5, 6, 7, torch.bfloat16, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside torch
        compiled = torch.compile(narrow, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(differentiate(compiled, given), differentiate(narrow, given), strict=True))


def test_second_derivatives_are_those_of_plain_operations(device: str) -> None:
    given = [a.requires_grad_() for a in inputs(3, 4, 5, torch.bfloat16, device)]

    def curvature(function) -> tuple[Tensor, ...]:
        slope = torch.autograd.grad(function(*given).sin().sum(), given, create_graph=True)
        return torch.autograd.grad(torch.stack([a.square().sum() for a in slope]).sum(), given)

    for a, b in zip(curvature(narrow), curvature(exactly), strict=True):
        judge.same(a.double().cpu(), b.double().cpu(), limit=numerics.rounding("bfloat16", 2))


def test_what_is_served() -> None:
    x, weight, _ = inputs(2, 48, 8, torch.bfloat16, "cpu")
    assert serves(x, weight)
    assert not serves(x.float(), weight)
    assert not serves(x.half(), weight)
    assert not serves(x, weight.bfloat16())
    assert not serves(x, torch.zeros(8, operator.WIDEST + 1))


@pytest.mark.parametrize(("dtype", "rows", "taken"), [(torch.bfloat16, 8, True), (torch.float32, 8, False), (torch.bfloat16, 7, False)])
def test_a_layer_of_16_bits_takes_it_for_many_rows(
    dtype: torch.dtype, rows: int, taken: bool, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(elementwise, "on_a_gpu", lambda x: True)
    monkeypatch.setattr(elementwise, "FEWEST", 2 * 8)
    seen: list[bool] = []
    monkeypatch.setattr(kernels, "narrow", lambda *given: (seen.append(True), narrow(*given))[1])
    x, weight, bias = inputs(rows, 6, 7, dtype, device)
    layer = FullLinear(6, 7).to(device)
    layer.load_state_dict({"weight": weight, "bias": bias})
    y = layer(x)
    assert bool(seen) == taken
    assert y.dtype == torch.float32
    judge.same(y.double().cpu(), exactly(x.double(), weight.double(), bias.double()).cpu(), limit=numerics.rounding("float32", 2**8))
