"""The kernels of S4D's recurrence against a float64 fold: values, all gradients, marks, bits, bad input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from unisono_spec.contract import InputError
from unisono_torch.kernels.diagonal_ssm import diagonal_ssm, discretised, operator, products
from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops import diagonal_ssm as op

from .reference import bound

NAMES = ("u", "power", "grown", "C", "D", "initial_state")


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    width: int
    pairs: int
    dtype: torch.dtype
    marked: bool = True

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}x{self.pairs}-{str(self.dtype)[6:]}{'-marked' if self.marked else ''}"


CASES = [
    Case(2, 19, 3, 3, torch.float32),
    Case(1, 10, 18, 2, torch.bfloat16),
    Case(1, 9, 3, 70, torch.float64, marked=False),
    Case(2, 19, 9, 3, torch.float32, marked=False),  # by products, as those without marks of at least a chunk
    Case(3, 8, 2, 1, torch.bfloat16, marked=False),
    Case(1, 4, 1, 2, torch.float16, marked=False),
    Case(1, 3, 2, 300, torch.float64, marked=False),
]
ON_GPU = [
    Case(2, 300, 100, 32, torch.bfloat16),
    Case(2, 1100, 100, 32, torch.bfloat16, marked=False),
    Case(1, 2048, 70, 100, torch.float16, marked=False),
    Case(64, 130, 65, 32, torch.float64, marked=False),
    Case(1, 2000, 33, 32, torch.float32, marked=False),
    Case(3, 2000, 33, 32, torch.float32, marked=False),
    Case(3, 70, 20, 100, torch.float16),
    Case(2, 130, 40, 32, torch.float64),
    Case(70_000, 2, 2, 2, torch.float32),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES if interpreted() else CASES + ON_GPU, ids=str)


def inputs(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokens that are not valid hold NaN."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    b, t, d, p = case.batch, case.length, case.width, case.pairs
    dt, A = (normal(d) - 2).exp(), torch.stack([-normal(d, p).exp(), 3 * normal(d, p)], -1)
    valid = torch.rand(b, t, generator=made) < 0.8 if case.marked else None
    u = normal(b, t, d)
    u = (u if valid is None else torch.where(valid[..., None], u, torch.nan)).to(case.dtype)
    rest = (op.powers(dt, A, 1)[1], op.gain(dt, A), normal(d, p, 2), normal(d), normal(b, d, p, 2))
    wide = operator.accumulator(case.dtype)
    marks = {"reset": torch.rand(b, t, generator=made) < 0.3 if case.marked else None, "valid": valid}
    tensors = dict(zip(NAMES, (u, *(a.to(wide) for a in rest)), strict=True))
    moved = {name: None if a is None else a.to(device) for name, a in marks.items()}
    return {name: a.to(device) for name, a in tensors.items()}, moved


def fold(u, power, grown, C, D, initial_state, reset=None, valid=None, sign=-1) -> tuple[Tensor, Tensor]:
    """The recurrence as written; sign 1: of absolute values, the sum of its terms'."""
    h, out = initial_state, []
    for t in range(u.shape[1]):
        x = u[:, t]
        if reset is not None:
            h = torch.where(reset[:, t, None, None, None], 0, h)
        if valid is not None:
            x = torch.where(valid[:, t, None], x, 0)
        (ar, ai), (hr, hi) = power.unbind(-1), h.unbind(-1)
        new = torch.stack([ar * hr + sign * ai * hi, ar * hi + ai * hr], -1) + grown * x[..., None, None]
        y = 2 * (C[..., 0] * new[..., 0] + sign * C[..., 1] * new[..., 1]).sum(-1) + D * x
        if valid is not None:
            new, y = torch.where(valid[:, t, None, None, None], new, h), torch.where(valid[:, t, None], y, 0)
        h = new
        out.append(y)
    return torch.stack(out, 1), h


def differentiate(function, tensors: dict[str, Tensor], upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    leaves = {name: a.detach().requires_grad_() for name, a in tensors.items()}
    outputs = function(**leaves)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return {"y": outputs[0].detach(), "final": outputs[1].detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def upstream_of(case: Case, device: str) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    shapes = (case.batch, case.length, case.width), (case.batch, case.width, case.pairs, 2)
    y, final = (torch.randn(*shape, generator=made).to(device) for shape in shapes)
    return y, final


def test_values_and_gradients(case: Case, device: str, grids: list[tuple[int, ...]]) -> None:
    tensors, marks = inputs(case, device)
    upstream = upstream_of(case, device)
    got = differentiate(lambda **a: diagonal_ssm(**a, **marks), tensors, upstream)
    assert all(len(grid) == 1 for grid in grids)  # others of a grid's axes end at 65,535
    exact = {name: a.double() for name, a in tensors.items()}
    want = differentiate(lambda **a: fold(**a, **marks), exact, (upstream[0].double(), upstream[1].double()))
    size = {name: a.abs() for name, a in exact.items()}
    terms = differentiate(lambda **a: fold(**a, **marks, sign=1), size, (upstream[0].double().abs(), upstream[1].double().abs()))
    acc, length = operator.accumulator(case.dtype), case.length * case.batch
    for name, value in got.items():
        assert value.dtype == (case.dtype if name == "du" else acc)
        allowed = 2 * bound(terms[name].abs(), value.dtype, acc, length, case.width * case.pairs, 8, 0)
        excess = (value.double() - want[name]).abs() / allowed
        assert bool((excess <= 1).all()), f"{name}: {excess.amax().item():.3g} times what rounding allows"
    if marks["valid"] is not None:
        assert not got["du"][~marks["valid"]].any()
        assert not got["y"][~marks["valid"]].any()


@pytest.mark.parametrize("marked", [False, True])
def test_sweeps_serve_marks_and_few_tokens_and_products_the_rest(device: str, marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    for name in ("forward", "backward"):
        there = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, name=name, there=there: (served.append(name), there(*a))[1])
    least = products.chunk(2) if interpreted() else products.LONG
    for length in (least, least - 1):
        case = Case(1, length, 2, 2, torch.float32, marked)
        tensors, marks = inputs(case, device)
        differentiate(lambda **a: diagonal_ssm(**a, **marks), tensors, upstream_of(case, device))  # noqa: B023
    assert served == ([] if marked else ["forward", "backward"])


def test_a_reset_cuts_nan(device: str) -> None:
    case = Case(1, 10, 2, 4, torch.float32, marked=False)
    tensors, marks = inputs(case, device)
    marks["reset"] = torch.arange(10, device=device)[None] == 6
    tensors["u"][:, 4] = torch.nan
    y, final = diagonal_ssm(**tensors, **marks)
    assert torch.isfinite(y[:, :4]).all()
    assert torch.isnan(y[:, 4:6]).all()
    assert torch.isfinite(y[:, 6:]).all()
    assert torch.isfinite(final).all()
    dy, dfinal = upstream_of(case, device)
    dy[:, 8] = torch.nan
    du = differentiate(lambda **a: diagonal_ssm(**a, **marks), inputs(case, device)[0], (dy, dfinal))["du"]
    assert torch.isfinite(du[:, :6]).all()
    assert torch.isnan(du[:, 6:9]).all()


def test_by_products_nan_reaches_its_chunk(device: str) -> None:
    """As documented: and what follows it, in y; what precedes it, in the gradient."""
    size = products.chunk(3)
    case = Case(1, 10 if interpreted() else products.LONG, 2, 3, torch.float32, marked=False)
    t = torch.arange(case.length, device=device) // size
    tensors, _ = inputs(case, device)
    dy, dfinal = upstream_of(case, device)
    tensors["u"][:, size + 1] = torch.nan
    y, _ = diagonal_ssm(**tensors)
    assert torch.equal(torch.isfinite(y), (t < 1)[None, :, None].expand_as(y))
    dy[:, size + 1] = torch.nan
    du = differentiate(diagonal_ssm, inputs(case, device)[0], (dy, dfinal))["du"]
    assert torch.equal(torch.isfinite(du), (t > 1)[None, :, None].expand_as(du))


def test_the_same_bits_twice_and_from_strided_inputs(device: str) -> None:
    case = Case(2, 9, 3, 4, torch.float32)
    tensors, marks = inputs(case, device)
    upstream = upstream_of(case, device)
    first = differentiate(lambda **a: diagonal_ssm(**a, **marks), tensors, upstream)
    tensors["u"] = torch.cat([tensors["u"], tensors["u"]], -1)[..., :3]
    upstream = (torch.stack([upstream[0], upstream[0]], -1)[..., 0], upstream[1])
    for name, value in differentiate(lambda **a: diagonal_ssm(**a, **marks), tensors, upstream).items():
        assert torch.equal(value, first[name]), name


def test_one_gradient_is_that_of_all(device: str) -> None:
    """And of sequences that do not lie end to end."""
    case = Case(2, 2, 1, 1, torch.float32, marked=False)
    tensors, _ = inputs(case, device)
    upstream = upstream_of(case, device)
    whole = differentiate(diagonal_ssm, tensors, upstream)
    tensors["u"] = torch.cat([tensors["u"], tensors["u"]], 1)[:, :2]
    for name, a in tensors.items():
        alone = differentiate(lambda **some: diagonal_ssm(**{**tensors, **some}), {name: a}, upstream)
        assert torch.equal(alone[f"d{name}"], whole[f"d{name}"]), name


@pytest.mark.parametrize("length", [2, 1024])
def test_an_output_that_nobody_reads_has_a_gradient_of_zero(device: str, length: int) -> None:
    case = Case(1, min(length, 5) if interpreted() else length, 2, 2, torch.float32, marked=False)
    tensors, _ = inputs(case, device)
    leaves = [a.requires_grad_() for a in tensors.values()]
    upstream = upstream_of(case, device)
    for which in range(2):
        given = tuple(g if i == which else torch.zeros_like(g) for i, g in enumerate(upstream))
        want = torch.autograd.grad(diagonal_ssm(*leaves), leaves, given)
        got = torch.autograd.grad(diagonal_ssm(*leaves)[which], leaves, upstream[which], allow_unused=True)
        for name, a, b in zip(NAMES, got, want, strict=True):
            assert torch.equal(a, b), name


def test_second_derivatives_are_those_of_plain_operations(device: str) -> None:
    case = Case(1, 3, 2, 2, torch.float64, marked=False)
    leaves = [a.requires_grad_() for a in inputs(case, device)[0].values()]
    assert torch.autograd.gradgradcheck(lambda *a: diagonal_ssm(*a)[0], leaves, fast_mode=True)


def test_the_op_takes_the_kernel(device: str) -> None:
    """With gradients of Δ and A; both forms of one function."""
    from unisono_conformance import judge

    case = Case(2, 11, 3, 3, torch.float64)
    tensors, marks = inputs(case, device)
    rest = [tensors[name] for name in ("C", "D", "initial_state")]
    made = torch.Generator().manual_seed(4)
    dt = (torch.randn(3, generator=made, dtype=torch.float64) - 2).exp().to(device).requires_grad_()
    A = torch.stack([-torch.rand(3, 3, generator=made), torch.randn(3, 3, generator=made)], -1).double().to(device).requires_grad_()
    found = []
    for how in ("triton", "plain"):
        y, final = op.parallel(tensors["u"], dt, A, *rest, **marks, implementation=how)
        gradients = torch.autograd.grad(y.sum() + final.square().sum(), (dt, A))
        found.append([a.detach().cpu() for a in (y, final, *gradients)])
    judge.same(*found)


def test_powers_and_gains_keep_their_digits(device: str) -> None:
    """Of slow and of fast decays and turns, each beside its own size, and their gradients; near ln 2 e^x − 1 is made another way."""
    from unisono_conformance import judge

    real, imag = torch.meshgrid(
        *(torch.tensor(a, dtype=torch.float64) for a in ((1e-3, 0.4, 0.69, 0.71, 3, 50), (0, 0.3, 2, 40))), indexing="ij"
    )
    A = torch.stack([-real, imag], -1).reshape(3, 8, 2).to(device)
    dt = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64, device=device)
    made = torch.Generator().manual_seed(5)
    upstream = torch.randn(2, 3, 8, 2, generator=made, dtype=torch.float64).to(device)
    found = []
    for form in (discretised, lambda dt, A: (op.powers(dt, A, 1)[1], op.gain(dt, A))):
        leaves = [a.clone().requires_grad_() for a in (dt, A)]
        values = form(*leaves)
        found.append([a.detach() for a in (*values, *torch.autograd.grad(values, leaves, tuple(upstream)))])
    size = [a.norm(dim=-1, keepdim=True) if a.ndim == 3 else a.abs() for a in found[1]]
    got, want = ([(a / s).cpu() for a, s in zip(each, size, strict=True)] for each in found)
    judge.same(got, want)
    assert torch.autograd.gradgradcheck(discretised, (dt.requires_grad_(), A.requires_grad_()), fast_mode=True)


def test_bad_input_is_named(device: str) -> None:
    tensors, _ = inputs(Case(1, 4, 3, 2, torch.float32), device)
    for name, value in (("u", torch.zeros(2)), ("C", torch.zeros(3)), ("grown", torch.zeros(3, 2)), ("valid", torch.zeros(1, 4))):
        with pytest.raises(InputError, match=f"{name}: got"):
            diagonal_ssm(**{**tensors, name: value.to(device)})
    assert diagonal_ssm(**{**tensors, "u": tensors["u"][:, :0]})[0].shape == (1, 0, 3)
