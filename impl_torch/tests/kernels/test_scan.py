"""The kernels against a float64 fold: values, all gradients, bits, bad input."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from unisono_conformance import judge
from unisono_spec.contract import InputError
from unisono_torch.kernels.decayed_sum import decayed_sum
from unisono_torch.kernels.registry import available
from unisono_torch.kernels.scan import operator
from unisono_torch.kernels.scan.chain import _state_before_cut
from unisono_torch.kernels.weighted_sum import weighted_sum
from unisono_torch.ops import decayed_sum as op

from .reference import SMALL, Case, absolute, bound, differentiate, fold, inputs, sigmoid


def kernel(case: Case, x, s, initial, reset, valid, out_dtype=None):
    if case.decay is None:
        return weighted_sum(x, s, initial, reset, valid, case.exclusive, out_dtype)
    return decayed_sum(x, case.decay, initial, reset, valid, out_dtype)


@pytest.fixture(autouse=True)
def _poison_and_cut(request, monkeypatch):
    """Fresh memory holds NaN; segments are as short as the case says."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    case = parameters.get("case") or parameters.get("drawn")
    if case:
        monkeypatch.setattr(operator, "SHORTEST", case.shortest)
        monkeypatch.setattr(operator, "WARPS", 1 << 20)
        monkeypatch.setattr(operator, "TILE", min(case.shortest, operator.TILE))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case, device: str, out_dtype: torch.dtype | None = None) -> None:
    tensors = inputs(case, 7, device)
    accumulator = operator.accumulator(case.dtype)
    out_dtype = out_dtype or accumulator
    shape = (case.batch, case.length, case.width)
    upstream = (torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], shape[2], dtype=torch.float64))
    upstream = (upstream[0].to(out_dtype).to(device), upstream[1].to(accumulator).to(device))
    got = differentiate(functools.partial(kernel, case, out_dtype=out_dtype), tensors, upstream)

    exact: dict[str, Any] = {k: v if v is None or v.dtype == torch.bool else v.double() for k, v in tensors.items()}
    reference = functools.partial(fold, decay=case.decay, exclusive=case.exclusive)
    wide = tuple(u.double() for u in upstream)
    want = differentiate(reference, exact, wide)
    positive = {**exact, "s": absolute(exact["s"]), "initial": absolute(exact["initial"])}
    terms = differentiate(reference, positive, tuple(u.abs() for u in wide))

    live = exact["x"] if exact["valid"] is None else exact["x"][exact["valid"]]
    largest_x = live.abs().amax().item() if live.numel() else 0.0
    largest = max(1.0, *(u.abs().amax().item() for u in wide))
    dtypes = {"xi": out_dtype, "final": accumulator, "dx": case.dtype, "ds": accumulator, "dinitial": accumulator}
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == dtypes[name], name
        allowed = bound(terms[name].abs(), dtypes[name], accumulator, case.length, case.width, largest_x, largest)
        judge.within(value.double().cpu(), want[name].cpu(), allowed.cpu(), name)
    if exact["valid"] is not None:
        assert not got["dx"][~exact["valid"]].any()


def test_values_and_gradients(drawn, device):
    check(drawn, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("decay", [0.5, None])
def test_narrow_outputs(dtype, decay, device):
    check(Case(2, 40, 20, dtype, decay, False, True, True, True, 4096), device, out_dtype=dtype)


@pytest.mark.parametrize("decay", [0.5, None, 0.001])  # the last is swept, the others are chained
def test_a_reset_cuts_nan(decay, device):
    """Inside a tile, and where one begins."""
    case, t = Case(1, 24, 5, torch.float32, decay, False, True, True, False, 8), torch.arange(24, device=device)
    tensors = inputs(case, 3, device)
    tensors["reset"] = ((t == 13) | (t == 16))[None]
    unknown = (t == 11) | (t == 14)
    tensors["x"][:, unknown] = float("nan")
    xi, _ = kernel(case, **tensors)
    lost = (t >= 11) & (t < 16) & (t != 13)
    assert torch.equal(torch.isnan(xi), lost[None, :, None].expand_as(xi))
    for cut in (13, 16):
        upstream = torch.where(t < cut, 0, torch.nan)[None, :, None].expand_as(xi)
        dx = differentiate(functools.partial(kernel, case), tensors, (upstream, torch.zeros(1, 5, device=device)))["dx"]
        assert not dx[:, (t < cut) & ~unknown].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in add:RuntimeWarning")  # of the interpreter: a rounded λ's part of infinity
def test_a_sweep_ends_what_is_not_finite_with_a_segment(device, monkeypatch):
    """As documented: to the last bit what it would be without, in segments beyond the halo; each way."""
    monkeypatch.setattr(operator, "SHORTEST", 16)
    monkeypatch.setattr(operator, "WARPS", 1 << 20)
    case, t = Case(1, 40, 3, torch.float32, 0.001, False, True, False, False, 16), torch.arange(40, device=device)
    tensors, upstream = inputs(case, 3, device), (torch.ones(1, 40, 3, device=device), torch.ones(1, 3, device=device))
    clean, _ = kernel(case, **tensors)
    tensors["initial"][:], tensors["x"][:, 3], upstream[0][:, 30] = torch.inf, torch.nan, torch.nan
    xi, final = kernel(case, **tensors)
    assert torch.equal(torch.isfinite(xi), (t >= 16)[None, :, None].expand_as(xi))
    assert torch.equal(xi[:, 16:], clean[:, 16:])
    assert torch.isfinite(final).all()
    dx = differentiate(functools.partial(kernel, case), tensors, upstream)["dx"]
    assert torch.equal(torch.isfinite(dx), ((t != 3) & ((t < 16) | (t > 30)))[None, :, None].expand_as(dx))


@triton.jit
def _later_two_first(x, out):
    """Of scanned elements 0, 1, 2: the state before the last, and after it."""
    c, e, a, s = _state_before_cut(  # pyright: ignore[reportGeneralTypeIssues]
        tl.load(x + 4), tl.load(x + 5), tl.load(x + 6), tl.load(x + 7), tl.load(x + 8), tl.load(x + 9), tl.load(x + 10), tl.load(x + 11)
    )
    _, e, _, s = _state_before_cut(tl.load(x), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3), c, e, a, s)
    tl.store(out, e)
    tl.store(out + 1, s)


def test_a_reset_cuts_nan_in_any_order_of_a_scan(device):
    """A GPU's, too: the interpreter scans one by one."""
    x = torch.tensor([[1, 0, 0.5, torch.nan], [1, 0, 0, 2], [1, 0, 0.5, 3]], device=device)
    out = torch.zeros(2, device=device)
    _later_two_first[(1,)](x, out)
    assert out.tolist() == [2, 4]


@pytest.mark.parametrize("case", [Case(2, 50, 5, d, None, False, True, True, False, 8) for d in (torch.float32, torch.float64)], ids=str)
def test_nan_passes_from_tile_to_tile(case, device):
    """As a number, not as the word that says that no state is there yet; up to a reset, and past a token that is not valid."""
    tensors, t = inputs(case, 3, device), torch.arange(50, device=device)
    tensors["reset"], tensors["valid"] = (mark[None].expand(2, 50) for mark in (t == 41, t != 43))
    tensors["x"][:, 3] = float("nan")
    xi, final = kernel(case, **tensors)
    assert torch.equal(torch.isnan(xi), ((t >= 3) & (t < 41))[None, :, None].expand_as(xi))
    assert torch.isfinite(final).all()
    upstream = torch.where(t == 45, torch.nan, 0).to(xi.dtype)[None, :, None].expand_as(xi)
    gradients = differentiate(functools.partial(kernel, case), tensors, (upstream, torch.zeros_like(final)))
    unknown = (t == 3) | ((t >= 41) & (t < 46) & (t != 43))
    for a in (gradients["dx"], gradients["ds"][..., None]):
        assert torch.equal(torch.isnan(a), unknown[None, :, None].expand_as(a))
        assert not a[:, ~unknown].any()
    tensors["initial"].view(torch.int64 if case.dtype == torch.float64 else torch.int32)[0] = -1  # the very word
    assert torch.isnan(kernel(case, **tensors)[0][0, :41]).all()


@pytest.mark.parametrize("case", [c for c in SMALL if c.length == 33][:4], ids=str)
def test_the_same_bits_twice(case, device):
    tensors = inputs(case, 5, device)
    upstream = (torch.randn(case.batch, case.length, case.width, device=device), torch.randn(case.batch, case.width, device=device))
    first, second = (differentiate(functools.partial(kernel, case), tensors, upstream) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("tile", "width"), [(16, 77), (256, 1000)])
def test_long_chains(tile, width, device, monkeypatch):
    """The state goes through all programs; on a GPU, where they wait for one another, the bits do not depend on who runs first."""
    length, repeats, width = (100, 2, width // 10) if device == "cpu" else (20000, 20, width)
    case = Case(3, length, width, torch.bfloat16, None, False, True, False, True, 4096)
    monkeypatch.setattr(operator, "TILE", tile)
    tensors = inputs(case, 9, device)
    upstream = (torch.randn(3, length, width, device=device), torch.randn(3, width, device=device))
    first = differentiate(functools.partial(kernel, case), tensors, upstream)
    live = tensors["valid"][..., None]
    terms = torch.where(live, tensors["s"].double()[..., None] * sigmoid(torch.where(live, tensors["x"], 0).double()), 0)
    state = tensors["initial"].double()
    for name, terms_, start in (("final", terms, state), ("dinitial", upstream[0].double(), upstream[1].double())):
        allowed = bound(start.abs() + terms_.abs().sum(1), torch.float32, torch.float32, length, 0, 20, 1)
        judge.within(first[name].double().cpu(), (start + terms_.sum(1)).cpu(), allowed.cpu(), name)
    for _ in range(repeats - 1):
        for name, value in differentiate(functools.partial(kernel, case), tensors, upstream).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("marked", [False, True])
def test_the_rounding_of_a_decay_does_not_add_up(marked, device):
    """λ = 0.9991 lies half a unit from the nearest float32, in which λ^1024 would be off by five hundred."""
    length, decay = 1024, 0.9991
    x, initial = torch.zeros(1, length, 1, device=device), torch.full((1, 1), 8.0, device=device, requires_grad=True)
    valid = torch.arange(length, device=device)[None] % 3 == 0 if marked else None
    xi, final = decayed_sum(x, decay, initial, None, valid)
    (slope,) = torch.autograd.grad(final.sum(), initial)
    count = torch.arange(1, length + 1) if valid is None else valid[0].cpu().cumsum(0)
    kept = decay ** count.double()
    want = 8 * kept + 0.5 * (1 - kept)
    for found, true in ((xi[0, :, 0], want), (final[0], want[-1:]), (slope[0], kept[-1:])):
        judge.within(found.detach().double().cpu(), true, bound(true, torch.float32, torch.float32, length, 1, 0, 8))


@pytest.mark.parametrize("kind", ["decayed", "weighted", "exclusive"])
def test_gradcheck(kind, device):
    case = Case(2, 5, 3, torch.float64, 0.9 if kind == "decayed" else None, kind == "exclusive", True, True, True, 4096)
    tensors: dict[str, Any] = {
        name: None if a is None else torch.nan_to_num(a) if a.is_floating_point() else a for name, a in inputs(case, 11, device).items()
    }
    names = [name for name in ("x", "s", "initial") if tensors[name] is not None]
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: kernel(case, **{**tensors, **dict(zip(names, values, strict=True))}), leaves, fast_mode=True
    )


@pytest.mark.parametrize("kind", ["decayed", "weighted", "exclusive"])
def test_gradgradcheck(kind, device):
    case = Case(2, 5, 3, torch.float64, 0.9 if kind == "decayed" else None, kind == "exclusive", True, True, True, 4096)
    tensors: dict[str, Any] = {
        name: None if a is None else torch.nan_to_num(a) if a.is_floating_point() else a for name, a in inputs(case, 11, device).items()
    }
    names = [name for name in ("x", "s", "initial") if tensors[name] is not None]
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(
        lambda *values: kernel(case, **{**tensors, **dict(zip(names, values, strict=True))}), leaves, fast_mode=True
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_transforms_of_torch_func_get_plain_operations(device):
    x = torch.randn(1, 4, 3, device=device, dtype=torch.float64)
    state = torch.zeros(1, 3, device=device, dtype=torch.float64)

    def loss(x, implementation):
        return op.parallel(x, 0.5, state, implementation=implementation)[0].square().sum()

    assert torch.equal(torch.func.hessian(loss)(x, "auto"), torch.func.hessian(loss)(x, "plain"))
    with pytest.raises(InputError, match=r"torch\.func"):
        torch.func.grad(loss)(x, "triton")


def test_strided_inputs(device):
    x = torch.randn(7, 2, 9, device=device).transpose(0, 1)[..., ::2]
    s = torch.randn(7, 2, device=device).T
    upstream = torch.randn(2, 5, 7, device=device).transpose(1, 2)
    for made in (lambda x: decayed_sum(x, 0.9), lambda x: weighted_sum(x, s)):
        strided, dense = (x.detach().requires_grad_(), x.detach().contiguous().requires_grad_())
        outputs = [made(strided)[0], made(dense)[0]]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(o, leaf, upstream)[0] for o, leaf in zip(outputs, (strided, dense), strict=True)]
        assert torch.equal(*gradients)
    state = torch.randn(2, 5, device=device, requires_grad=True)
    dfinal = torch.randn(5, 2, device=device).T
    for made in (lambda h: decayed_sum(x, 0.9, h), lambda h: weighted_sum(x, s, h)):
        found = [torch.autograd.grad(made(state)[1], state, d)[0] for d in (dfinal, dfinal.contiguous())]
        assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (2, 0, 3)])
def test_nothing_to_sum(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    state = torch.randn(shape[0], shape[2], device=device, requires_grad=True)
    weight = torch.ones(shape[:2], device=device, requires_grad=True)
    for xi, final in (decayed_sum(x, 0.5, state), weighted_sum(x, weight, state)):
        assert xi.shape == shape
        assert torch.equal(final, state)
        (slope,) = torch.autograd.grad(final.sum(), state, retain_graph=True)
        assert torch.equal(slope, torch.ones_like(state))
    assert not torch.autograd.grad(final.sum(), weight)[0].any()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "x: got torch.int32"),
        ({"decay": 1.0}, "decay: got 1.0"),
        ({"initial_state": torch.zeros(3, 3)}, "initial_state: got torch.float32 \\(3, 3\\)"),
        ({"reset": torch.zeros(2, 4)}, "reset: got torch.float32"),
        ({"valid": torch.zeros(2, 5, dtype=torch.bool)}, "valid: got torch.bool \\(2, 5\\)"),
    ],
)
def test_bad_input_is_named(changed, words):
    with pytest.raises(InputError, match=words):
        decayed_sum(**{"x": torch.zeros(2, 4, 3), "decay": 0.5, **changed})


def test_the_operator_can_be_traced(device):
    case = Case(2, 9, 5, torch.float32, None, False, True, True, False, 4096)
    t = inputs(case, 1, device)
    for name in ("x", "s", "initial"):
        t[name].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside torch
        torch.library.opcheck(torch.ops.unisono.scan.default, (t["x"], t["s"], t["initial"], t["reset"], None, 1.0, False, torch.float32))
        compiled = torch.compile(lambda x, s: weighted_sum(x, s)[0] * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(t["x"], t["s"]), weighted_sum(t["x"], t["s"])[0] * 2)


def test_availability(device):
    assert available(device)
    assert not available("meta")
