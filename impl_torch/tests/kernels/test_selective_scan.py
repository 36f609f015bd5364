"""The kernels of the selective scan against a float64 fold: values, all gradients, marks, cuts of time, bits, bad input."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from unisono_spec.contract import InputError
from unisono_torch.kernels.registry import interpreted
from unisono_torch.kernels.selective_scan import operator, selective_scan

from .reference import bound

NAMES = ("u", "dt", "A", "B", "C", "D", "initial_state", "z")


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    width: int
    states: int
    dtype: torch.dtype
    marked: bool = True
    gated: bool = True  # with softplus
    warps: int = 1  # more than launched: time is cut
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        marks = ("-marked" if self.marked else "") + ("-gated" if self.gated else "") + ("-cut" if self.warps > 1 else "")
        return f"{self.batch}x{self.length}x{self.width}x{self.states}-{str(self.dtype)[6:]}{marks}"


CASES = [
    Case(2, 11, 3, 3, torch.float32),
    Case(1, 18, 9, 4, torch.bfloat16, warps=64),
    Case(1, 9, 2, 17, torch.float32, gated=False),
    Case(1, 18, 3, 5, torch.float64, warps=64),
    Case(1, 8, 2, 8, torch.float16, marked=False, out_dtype=torch.float16),
]
ON_GPU = [
    Case(2, 300, 100, 16, torch.bfloat16),
    Case(1, 2000, 70, 16, torch.float32, warps=512),
    Case(1, 1000, 33, 64, torch.bfloat16, warps=512),
    Case(2, 100, 50, 30, torch.float16, gated=False),
    Case(2, 200, 50, 16, torch.float64, warps=512),
    Case(8, 257, 1536, 16, torch.bfloat16, marked=False, out_dtype=torch.bfloat16),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES if interpreted() else CASES + ON_GPU, ids=str)


@pytest.fixture(autouse=True)
def _cut(request, monkeypatch):
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    monkeypatch.setattr(operator, "WARPS", case.warps if case else 1)


def inputs(case: Case, device: str, seed: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokens that are not valid hold NaN or infinity."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    b, t, d, n = case.batch, case.length, case.width, case.states
    wide = operator.accumulator(case.dtype)
    dt = 2 * normal(b, t, d) - 2
    tensors = {"u": normal(b, t, d), "dt": dt if case.gated else dt.exp(), "B": normal(b, t, n), "C": normal(b, t, n)}
    if case.gated:
        tensors["z"] = 2 * normal(b, t, d)
    valid = torch.rand(b, t, generator=made) < 0.8 if case.marked else None
    if valid is not None:
        tensors = {name: torch.where(valid[..., None], a, torch.nan) for name, a in tensors.items()}
    tensors = {name: a.to(case.dtype) for name, a in tensors.items()}
    tensors |= {"A": -normal(d, n).exp().to(wide), "D": normal(d).to(wide), "initial_state": normal(b, d, n).to(wide)}
    if "z" in tensors:  # whose sequences do not lie end to end
        tensors["z"] = torch.cat([tensors["z"], tensors["z"]], 1)[:, :t]
    marks = {"reset": torch.rand(b, t, generator=made) < 0.15 if case.marked else None, "valid": valid}
    return {name: tensors[name].to(device) for name in NAMES if name in tensors}, {
        name: None if a is None else a.to(device) for name, a in marks.items()
    }


def fold(u, dt, A, B, C, D, initial_state, z=None, reset=None, valid=None, gated=True, steep=False) -> tuple[Tensor, Tensor]:
    """Token by token. steep: the slope of exp(ΔA) has the other sign, so that with the gain's it adds up."""
    if valid is not None:
        u, dt, B, C = (torch.where(valid[..., None], a, 0) for a in (u, dt, B, C))
        z = None if z is None else torch.where(valid[..., None], z, 0)
    delta = -torch.nn.functional.logsigmoid(-dt) if gated else dt
    if valid is not None:
        delta = torch.where(valid[..., None], delta, 0)
    h, out = initial_state, []
    for t in range(u.shape[1]):
        exponent = delta[:, t, :, None] * A
        decay = exponent.detach().exp() * (2 * exponent.detach() - exponent if steep else exponent).sub(exponent.detach()).exp()
        if reset is not None:
            h = torch.where(reset[:, t, None, None], 0, h)
        h = decay * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    y = torch.stack(out, 1)
    if z is not None:
        # |SiLU| ≤ |z|, and its slope is at most 1.1
        y = y * (1.1 * z if steep else z * torch.sigmoid(z))
    return y, h


def differentiate(function, tensors: dict[str, Tensor], upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    leaves = {name: a.detach().requires_grad_() for name, a in tensors.items()}
    outputs = function(**leaves)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return {"y": outputs[0].detach(), "final": outputs[1].detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def run(case: Case, tensors: dict[str, Any], marks: dict[str, Any], upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return differentiate(
        lambda **leaves: selective_scan(**leaves, **marks, softplus=case.gated, out_dtype=case.out_dtype), tensors, upstream
    )


def upstream_of(case: Case, device: str) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    shapes = (case.batch, case.length, case.width), (case.batch, case.width, case.states)
    y, final = (torch.randn(*shape, generator=made).to(case.out_dtype or torch.float32).float().to(device) for shape in shapes)
    return y, final


def test_values_and_gradients(case: Case, device: str) -> None:
    check(case, *inputs(case, device), device)


def test_small_steps_keep_their_digits(device: str) -> None:
    """softplus of what is far below 0, where nothing larger covers its error, in more digits than u has, as in a Mamba block."""
    case = Case(1, 3, 2, 4, torch.bfloat16, marked=False)
    tensors, marks = inputs(case, device)
    dt = 1.00025 * tensors["dt"].float() - 9
    check(case, {**tensors, "dt": dt, "D": 0 * tensors["D"], "initial_state": 0 * tensors["initial_state"]}, marks, device)


def check(case: Case, tensors: dict[str, Any], marks: dict[str, Any], device: str) -> None:
    upstream = upstream_of(case, device)
    got = run(case, tensors, marks, upstream)
    exact = {name: a.double() for name, a in tensors.items()}
    want = differentiate(lambda **a: fold(**a, **marks, gated=case.gated), exact, (upstream[0].double(), upstream[1].double()))
    # e^−x errs by x roundings of itself: x e^−x ≤ e^−x/2, which is what half of A decays by
    size = {name: a / 2 if name == "A" else a if name == "dt" else a.abs() for name, a in exact.items()}
    terms = differentiate(
        lambda **a: fold(**a, **marks, gated=case.gated, steep=True), size, (upstream[0].double().abs(), upstream[1].double().abs())
    )
    acc, length = operator.accumulator(case.dtype), case.length * case.batch
    for name, value in got.items():
        assert value.dtype == (tensors[name[1:]].dtype if name[0] == "d" else acc if name == "final" else case.out_dtype or acc)
        allowed = 2 * bound(terms[name].abs(), value.dtype, acc, length, case.width * case.states, 8, 0)
        excess = (value.double() - want[name]).abs() / allowed
        assert bool((excess <= 1).all()), f"{name}: {excess.amax().item():.3g} times what rounding allows"
    if marks["valid"] is not None:
        for name in ("du", "ddt", "dB", "dC", *(("dz",) if case.gated else ())):
            assert not got[name][~marks["valid"]].any(), name
        assert not got["y"][~marks["valid"]].any()


def test_a_reset_cuts_nan(device: str) -> None:
    case = Case(1, 10, 2, 4, torch.float32, marked=False)
    tensors, marks = inputs(case, device)
    marks["reset"] = torch.arange(10, device=device)[None] == 6
    tensors["u"][:, 4] = torch.nan
    y, final = selective_scan(**tensors, **marks, softplus=True)
    assert torch.isfinite(y[:, :4]).all()
    assert torch.isnan(y[:, 4:6]).all()
    assert torch.isfinite(y[:, 6:]).all()
    assert torch.isfinite(final).all()
    assert torch.isfinite(run(case, tensors, marks, upstream_of(case, device))["ddt"][:, 6:]).all()
    tensors, _ = inputs(case, device)
    dy, dfinal = upstream_of(case, device)
    dy[:, 8] = torch.nan
    du = run(case, tensors, marks, (dy, dfinal))["du"]
    assert torch.isfinite(du[:, :6]).all()
    assert torch.isnan(du[:, 6:9]).all()


def test_the_same_bits_twice_and_from_strided_inputs(device: str) -> None:
    case = Case(1, 9, 3, 4, torch.float32, warps=64)
    tensors, marks = inputs(case, device)
    upstream = upstream_of(case, device)
    first = run(case, tensors, marks, upstream)
    both = torch.cat([tensors["u"], tensors["z"]], -1)
    tensors["u"], tensors["z"] = both.chunk(2, -1)
    tensors["dt"] = torch.cat([tensors["dt"], both], -1)[..., :3]
    tensors["B"] = torch.stack([tensors["B"], tensors["B"]], -1)[..., 0]
    upstream = (torch.stack([upstream[0], upstream[0]], -1)[..., 0], upstream[1])
    for name, value in run(case, tensors, marks, upstream).items():
        assert torch.equal(value, first[name]), name


def test_one_gradient_is_that_of_all(device: str) -> None:
    case = Case(1, 2, 1, 1, torch.float32, marked=False)
    tensors, marks = inputs(case, device)
    upstream = upstream_of(case, device)
    whole = run(case, tensors, marks, upstream)
    for name, a in tensors.items():
        alone = differentiate(lambda **some: selective_scan(**{**tensors, **some}, softplus=True), {name: a}, upstream)
        assert torch.equal(alone[f"d{name}"], whole[f"d{name}"]), name


def test_the_operator_can_be_traced(device: str) -> None:
    case = Case(1, 5, 2, 3, torch.float32, marked=False)
    tensors, _ = inputs(case, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside torch
        compiled = torch.compile(lambda **a: selective_scan(**a, softplus=True)[0] * 2, fullgraph=True, backend="aot_eager")
        leaves = {name: a.requires_grad_() for name, a in tensors.items()}
        y, plain = compiled(**leaves), selective_scan(**leaves, softplus=True)[0] * 2
        assert torch.equal(y, plain)
        pairs = zip(*(torch.autograd.grad(o.sum(), list(leaves.values())) for o in (y, plain)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_second_derivatives_are_those_of_plain_operations(device: str) -> None:
    case = Case(1, 3, 2, 2, torch.float64, marked=False)
    tensors, _ = inputs(case, device)
    leaves = [a.requires_grad_() for a in tensors.values()]
    assert torch.autograd.gradgradcheck(
        lambda *values: selective_scan(**dict(zip(tensors, values, strict=True)), softplus=True)[0], leaves, fast_mode=True
    )


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 2)])
def test_nothing_to_scan(shape: tuple[int, int, int, int], device: str) -> None:
    case = Case(*shape, torch.float32, marked=False)
    tensors, marks = inputs(case, device)
    got = run(case, tensors, marks, upstream_of(case, device))
    assert got["y"].shape == shape[:3]
    assert not got["dA"].any()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"u": torch.zeros(2, 3)}, "u: got torch.float32"),
        ({"B": torch.zeros(1, 4, 2)}, "B: got torch.float32 \\(1, 4, 2\\)"),
        ({"z": torch.zeros(1, 4, 2)}, "z: got torch.float32 \\(1, 4, 2\\)"),
        ({"valid": torch.zeros(1, 4)}, "valid: got torch.float32"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], words: str) -> None:
    tensors, marks = inputs(Case(1, 4, 3, 3, torch.float32, marked=False), "cpu")
    with pytest.raises(InputError, match=words):
        selective_scan(**{**tensors, **marks, **changed})


def test_gradients_lie_end_to_end() -> None:
    """As kernels write them, whatever arrives: a final state's gradient in turned strides lent them to the initial state's."""
    u, B, dfinal = (torch.ones(2, size, other).mT for size, other in ((6, 4), (3, 4), (3, 6)))
    A, D = torch.ones(6, 3), torch.ones(6)
    found = operator._scan_backward_fake(u, dfinal, u, u, A, B, B, D, u, None, None, u, True)
    assert not dfinal.is_contiguous()
    assert [tuple(a.shape) for a in found] == [tuple(a.shape) for a in (u, u, A, B, B, D, u, dfinal)]
    assert all(a.is_contiguous() for a in found)
