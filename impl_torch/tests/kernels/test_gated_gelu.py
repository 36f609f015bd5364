"""GELU of what a gate lets through, as kernels, against float64: values, slopes, rows apart, second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_torch.kernels import gelu
from unisono_torch.layers import ffn
from unisono_torch.layers.basic import Linear
from unisono_torch.ops import elementwise


def both(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    leaves = [a.detach().requires_grad_() for a in (x, bias) if a is not None]
    y = elementwise.gated_gelu(*leaves)
    dy = torch.linspace(-1, 1, x.numel(), device=x.device, dtype=torch.float64).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.reshape(x.shape)[..., : y.shape[-1]])  # rows that lie apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_slopes(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than a block holds, in rows that lie apart; gates and tails far out."""
    made = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(2, 3, 2100, generator=made)).to(device, dtype)[..., :2060]
    exact = both(x.double())
    monkeypatch.setattr(elementwise, "on_a_gpu", lambda x: True)
    found = both(x)
    name = str(dtype).removeprefix("torch.")
    for a, e in zip(found, exact, strict=True):
        assert a.dtype == dtype
        # a σ(b) to some 2⁴ roundings, which e^−z² takes 2⁸ times; the result is rounded, by the interpreter towards zero
        budget = numerics.rounding("float32", 2**12) * (1 + e.abs()) + numerics.rounding(name, 4) * e.abs() + numerics.TINY[name]
        judge.within(a.double().cpu(), e.cpu(), budget.cpu(), "value or slope")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held in float32 whatever x is; its gradient sums more rows than a program has, the last program fewer."""
    made = torch.Generator().manual_seed(1)
    x = (2 * torch.randn(2 * gelu.GATED_ROWS + 3, 2 * gelu.GATED + 6, generator=made)).to(device, dtype)
    bias = torch.randn(x.shape[-1], generator=made).to(device)
    exact = both(x.double(), bias.double())
    size = both(x.double().abs(), bias.double())[0].shape[0]
    monkeypatch.setattr(elementwise, "on_a_gpu", lambda x: True)
    found = both(x, bias)
    assert found[2].dtype == torch.float32
    name = str(dtype).removeprefix("torch.")
    for a, e, sums in zip(found, exact, (1, 1, size), strict=True):
        narrow = "float32" if a is found[2] else name
        budget = sums * numerics.rounding("float32", 2**12) * (1 + e.abs()) + numerics.rounding(narrow, 4) * e.abs() + numerics.TINY[narrow]
        judge.within(a.double().cpu(), e.cpu(), budget.cpu(), "value, slope or the bias's gradient")


def test_entries_that_lie_apart(device: str) -> None:
    """The same bits as of their copies."""
    x, dy = torch.linspace(-2, 2, 12, device=device).reshape(2, 6), torch.ones(2, 3, device=device)
    found = []
    for lay in (torch.clone, lambda a: torch.stack([a, a + 1], -1)[..., 0]):
        leaf = lay(x).requires_grad_()
        y = gelu.gated(leaf)
        found.append([y, *torch.autograd.grad(y, leaf, lay(dy))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_rows_that_a_compiler_pads_are_not_copied() -> None:
    """It would copy them for an operator that does not say that they may lie in any way."""
    for op in (torch.ops.unisono.gated_gelu, torch.ops.unisono.gated_gelu_backward):
        assert torch.Tag.flexible_layout in op.default.tags


@pytest.mark.parametrize("biased", [True, False])
def test_second_derivatives_are_those_of_plain_operations(biased: bool, device: str) -> None:
    x, bias = torch.linspace(-2, 2, 12, device=device).reshape(2, 6), torch.linspace(1, -1, 6, device=device)

    def curvature(function) -> list[Tensor]:
        leaves = [a.detach().requires_grad_() for a in ((x, bias) if biased else (x,))]
        slopes = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        return [a.cpu() for a in torch.autograd.grad(torch.cat([slope.flatten() for slope in slopes]).square().sum(), leaves)]

    for found, exact in zip(curvature(gelu.gated), curvature(gelu._plain), strict=True):
        judge.same(found, exact, limit=numerics.rounding("float32", 2**8))


def _forward_hook(layer: Linear, seen: list[str]) -> None:
    layer.register_forward_hook(lambda *_: seen.append("forward"))


def _backward_hook(layer: Linear, seen: list[str]) -> None:
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))


def _another_forward(layer: Linear, seen: list[str]) -> None:
    real = layer.forward

    def forward(x: Tensor) -> Tensor:
        seen.append("another")
        return real(x)

    layer.forward = forward


@pytest.mark.parametrize("touch", [_forward_hook, _backward_hook, _another_forward])
def test_the_layer_calls_a_product_that_something_sees(touch, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nothing sees is made without its bias."""
    monkeypatch.setattr(ffn, "on_a_gpu", lambda x: True)
    monkeypatch.setattr(elementwise, "on_a_gpu", lambda x: True)
    given, real = [], gelu.gated
    monkeypatch.setattr(gelu, "gated", lambda x, bias: given.append(bias is not None) or real(x, bias))
    layer = ffn.GatedGELU(4, 3).to(device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    seen: list[str] = []
    layer(torch.ones(2, 4, device=device))
    touch(layer.up, seen)
    layer(torch.ones(2, 4, device=device, requires_grad=True)).sum().backward()
    assert given == [True, False]
    assert len(seen) == 1


def test_an_odd_row_is_refused() -> None:
    with pytest.raises(InputError, match="x: 5 entries, expected an even number"):
        elementwise.gated_gelu(torch.zeros(2, 5))
