"""Linear attention's kernels against sums over all pairs of tokens in float64: values, every gradient, bits, what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_torch.kernels.linear_attention import linear_attention, operator, table
from unisono_torch.ops import linear_attention as plain
from unisono_torch.ops import mapped_attention

from .dense import NAMES, Case, budget, inputs, written_out

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = (
    Case(2, 40, 1, 20, 12, F32, "elu1", reset=True, valid=True, segments=True),
    Case(1, 37, 2, 16, 32, F32, "none", packed=True),  # strides that count sixteens
    Case(1, 70, 1, 17, 16, F32, "learned", reset=True, segments=True),  # segments of more chunks than one
    Case(1, 20, 1, 16, 33, F32, "relu", valid=True),
    Case(1, 40, 1, 16, 16, BF16, "elu1", reset=True, valid=True, segments=True),
    Case(2, 20, 1, 16, 20, F16, "learned", packed=True),
    Case(2, 1, 1, 3, 4, F32, "elu1", reset=True),
    Case(1, 70, 1, 4, 5, F32, "taylor2", reset=True, valid=True, segments=True),
    Case(1, 48, 1, 3, 4, F32, "taylor2", reset=True, segments=True),  # segments that begin inside what one state is kept for
    Case(1, 34, 2, 3, 20, F32, "taylor2"),  # two blocks of values
    Case(1, 18, 2, 11, 3, F16, "taylor2", valid=True),
    Case(1, 2, 1, 3, 4, BF16, "taylor2"),
)
WIDTHS = ((16, 16), (20, 33), (64, 64), (64, 128), (80, 48), (128, 128), (200, 256), (256, 16))
LARGE = tuple(
    Case(2, length, 3, K, V, dtype, feature_map, reset=i % 2 == 0, valid=i % 3 == 0, segments=i % 4 < 2, packed=i % 5 == 0)
    for i, (dtype, (K, V)) in enumerate((dtype, widths) for dtype in (F32, BF16, F16) for widths in WIDTHS)
    for length, feature_map in (((127, 333, 1000, 64)[i % 4], ("elu1", "learned", "none", "relu")[i % 4]),)
) + tuple(
    Case(2, length, 3, K, V, dtype, "taylor2", reset=i % 2 == 0, valid=i % 3 == 0, segments=i % 4 < 2, packed=i % 5 == 0)
    for i, (dtype, (K, V, length)) in enumerate(
        (dtype, shape) for dtype in (F32, BF16, F16) for shape in ((16, 64, 333), (8, 20, 127), (16, 100, 1000), (11, 64, 64))
    )
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("device", None) == "cuda"
        metafunc.parametrize("case", SMALL + LARGE if on_gpu else SMALL, ids=str)


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(case: Case, given: dict, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(table, "PROGRAMS", 1 << 20 if case.segments else 1)
    monkeypatch.setattr(table, "OWN", math.inf)
    monkeypatch.setattr(table, "SHORTEST", 16 if case.length < 64 else 24 if case.length < 128 else 128)
    monkeypatch.setattr(table, "FEW", 1 << 20)
    monkeypatch.setattr(table, "NARROW", 16 if case.V < 64 else 64)
    # the halves that an H100 takes of 128 features and more
    halved = table.width_of(case.K, 1) > 16
    monkeypatch.setattr(table, "INTERPRETED", dataclasses.replace(table.INTERPRETED, split=halved))
    leaves = [given[name].detach().requires_grad_() for name in ("q", "k", "v", "S", "z", "tau") if given[name] is not None]
    q, k, v, S, z, *tau = leaves
    o, (S_end, z_end) = linear_attention(q, k, v, (S, z), given["reset"], given["valid"], case.feature_map, *tau)
    gradients = torch.autograd.grad([o, S_end, z_end], leaves, [given["do"], given["dS"], given["dz"]])
    return dict(zip(NAMES, (o.detach(), S_end.detach(), z_end.detach(), *gradients), strict=False))


def test_values_and_gradients(case: Case, device: str, monkeypatch: pytest.MonkeyPatch):
    given = inputs(case, device)
    found, exact, terms = run(case, given, monkeypatch), written_out(case, given), written_out(case, given, -1.0)
    for name, a in found.items():
        wide = F32 if name in ("S", "z", "dS", "dz", "dtau") else case.dtype
        assert a.dtype == wide, name
        judge.within(a.double().cpu(), exact[name].cpu(), budget(case, name, terms[name]).cpu(), name)


def test_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch):
    case = Case(1, 33, 1, 16, 16, F32, "elu1", segments=True)
    given = inputs(case, device)
    first, again = (run(case, given, monkeypatch) for _ in range(2))
    assert all(torch.equal(a, again[name]) for name, a in first.items())


def test_time_is_cut_by_shape_alone():
    assert operator.segments(1024, 1 << 20, 64) == (1, 1 << 20)
    assert operator.segments(128, 4096, 64) == (2, 2048)
    assert operator.segments(16, 32768, 64) == (16, 2048)
    assert operator.segments(16, 100, 64) == (1, 128)
    count, each = operator.segments(3, 100_000, 64)
    assert (count - 1) * each < 100_000 <= count * each


def test_every_width_and_dtype_has_a_cut():
    assert {table.width_of(K, V) for K in range(1, 257) for V in (1, 256)} == {16, 32, 64, 128, 256}
    assert set(table.TABLE) == {
        (way, product, width) for way in ("forward", "backward") for product in ("bfloat16", "float32") for width in (16, 32, 64, 128, 256)
    }
    assert set(table.CHUNKS) == set(table.SWEEPS) == {(mode, product) for mode in "oqk" for product in ("bfloat16", "float32")}
    for key, cut in table.SWEEPS.items():
        assert cut.every & (cut.every - 1) == 0
        assert cut.every % cut.chunk == cut.every % table.CHUNKS[key].chunk == 0


def test_the_ops_reach_the_kernel(device: str):
    case = Case(1, 5, 1, 3, 4, BF16, "relu")
    given = inputs(case, device)
    q, k, v, state = given["q"], given["k"], given["v"], (given["S"], given["z"])
    exact, terms = written_out(case, given)["o"], written_out(case, given, -1.0)["o"]
    for o in (
        mapped_attention.parallel(q, k, v, state, None, None, "relu", None, 4, "triton")[0],
        plain.parallel(q.relu(), k.relu(), v, state, implementation="triton")[0],
    ):
        assert o.dtype == BF16  # plain operations give float32
        judge.within(o.double().cpu(), exact.cpu(), budget(case, "o", terms).cpu(), "o")


def test_an_operator_that_compilers_know(device: str):
    case = Case(1, 3, 1, 3, 4, F32, "learned", reset=True, valid=True)
    given = inputs(case, device)
    given = {name: None if a is None else torch.nan_to_num(a) if a.is_floating_point() else a for name, a in given.items()}
    arguments = *(given[name] for name in ("q", "k", "v", "S", "z", "tau", "reset", "valid")), "learned"
    for a in arguments[:6]:
        a.requires_grad_()
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.unisono.linear_attention.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_second_derivatives(device: str):
    given = inputs(Case(1, 3, 1, 3, 4, F32, "learned"), device)
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v", "S", "z", "tau")]

    def twice(implementation: str) -> tuple[torch.Tensor, ...]:
        q, k, v, S, z, tau = leaves
        o, _ = mapped_attention.parallel(q, k, v, (S, z), None, None, "learned", tau, 4, implementation)
        once = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in once]).sum(), leaves)

    for found, exact in zip(twice("triton"), twice("plain"), strict=True):
        judge.within(found.cpu(), exact.cpu(), numerics.formula("float32", 3, 1, gradient=True) * exact.abs().max().cpu())


def test_what_is_computed_again_for_the_gradient(device: str):
    given = inputs(Case(1, 5, 1, 3, 4, F32, "elu1", reset=True, valid=True), device)
    q, k, v, S, z = (given[name].detach().requires_grad_() for name in ("q", "k", "v", "S", "z"))

    def op() -> torch.Tensor:
        return linear_attention(q, k, v, (S, z), given["reset"], given["valid"], "elu1")[0]

    once = torch.autograd.grad(op(), (q, k, v, S, z), given["do"])
    again = torch.autograd.grad(checkpoint(op, use_reentrant=False), (q, k, v, S, z), given["do"])
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_tau_has_a_gradient_where_it_is_learned_alone(device: str):
    given, tau = inputs(Case(1, 5, 1, 3, 4, F32, "elu1"), device), torch.ones(1, device=device, requires_grad=True)
    q, k, v, S, z = (given[name].detach().requires_grad_() for name in ("q", "k", "v", "S", "z"))
    for name, whether in (("elu1", False), ("learned", True)):
        o, _ = mapped_attention.parallel(q, k, v, (S, z), None, None, name, tau, implementation="triton")
        (slope,) = torch.autograd.grad(o, [tau], given["do"], allow_unused=True)
        assert (slope is not None) == whether


def test_bad_input_is_named(device: str):
    given = inputs(Case(1, 3, 1, 3, 4, F32, "elu1"), device)
    q, k, v, state = given["q"], given["k"], given["v"], (given["S"], given["z"])
    with pytest.raises(InputError, match="initial_state's z"):
        linear_attention(q, k, v, (state[0], state[1][..., :2]))
    with pytest.raises(InputError, match="one dtype"):
        linear_attention(q, k, v.bfloat16(), state)
    bad = ("elu", None, "feature_map: 'elu' is unknown"), ("learned", None, "tau: None"), ("learned", q[0, 0, 0], "tau: got")
    for name, tau, words in bad:
        with pytest.raises(InputError, match=words):
            linear_attention(q, k, v, state, feature_map=name, tau=tau)
    wide = torch.zeros(1, 3, 1, 257, device=device)
    with pytest.raises(InputError, match="K from 1 to 256, not 257"):
        plain.parallel(
            wide, wide, v, (torch.zeros(1, 1, 257, 4, device=device), torch.zeros(1, 1, 257, device=device)), implementation="triton"
        )
    wide = wide[..., :17]
    with pytest.raises(InputError, match="K from 1 to 256, not 307"):  # features of 17
        mapped_attention.parallel(wide, wide, v, state, None, None, "taylor2", None, 4, "triton")
