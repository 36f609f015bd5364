"""The kernels of multi-scale attention against sums over all pairs of tokens in float64: values, every gradient, bits, what they refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_torch.kernels.multiscale import multiscale, parts, table
from unisono_torch.ops import multiscale as plain

from .dense_multiscale import NAMES, Case, budget, inputs, written_out

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = (
    Case(1, 36, 1, 3, 4, 2, F32, data=True, valid=True, pieces=True, chunk=4),
    Case(2, 36, 1, 4, 3, 2, F32, same=False, data=True, gates="head", reset=True, valid=True, pieces=True),
    Case(1, 20, 2, 32, 16, 2, F16, packed=True),  # strides that count sixteens
    Case(1, 17, 2, 4, 20, 1, F32, same=False, gates="head", valid=True, packed=True),
    Case(1, 33, 1, 4, 4, 2, F32, data=True, fast=True, gates="channel", valid=True),
    Case(1, 33, 1, 4, 4, 2, F32, fast=True),
    Case(2, 1, 1, 3, 4, 2, BF16, reset=True),
    Case(1, 33, 1, 4, 5, 2, F32, same=False, gates="head"),
    Case(1, 150, 1, 64, 64, 2, BF16, pieces=True, trend=True),  # as on a Hopper GPU
    Case(1, 70, 2, 64, 64, 2, BF16, gates="head", pieces=True, packed=True),
    Case(1, 70, 1, 64, 64, 1, BF16, old=True),
    Case(1, 150, 1, 64, 64, 1, BF16, fixed=True, trend=True),
    Case(1, 130, 2, 64, 64, 1, BF16, fixed=True, gates="head", packed=True),
    Case(1, 70, 1, 64, 64, 1, BF16, fixed=True, fast=True, old=True),
)
WIDTHS = ((16, 16), (20, 33), (32, 32), (64, 64), (64, 128), (80, 48), (128, 128), (100, 128))
LARGE = tuple(
    Case(
        2, (127, 333, 1000, 64)[i % 4], 3, K, V, 1 + i % 5, dtype, same=i % 2 == 0, data=i % 3 == 0,
        gates=("token", "head", "channel")[i % 3], reset=i % 4 == 1, valid=i % 5 == 2, pieces=i % 4 < 2, fast=i % 6 == 5, packed=i % 7 == 0,
    )
    for i, (dtype, (K, V)) in enumerate((dtype, widths) for dtype in (F32, BF16, F16) for widths in WIDTHS)
) + tuple(
    Case(2, length, 2, 64, 64, scales, BF16, pieces=length > 300 and not fixed, fixed=fixed)
    for scales, fixed in ((1, False), (4, False), (1, True)) for length in (1, 64, 333, 1000)
)  # fmt: skip


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
    monkeypatch.setattr(table, "FEW", 1 << 20 if case.pieces else 0)
    monkeypatch.setattr(table, "PROGRAMS", 1 << 20)
    monkeypatch.setattr(table, "OWN", math.inf)
    monkeypatch.setattr(table, "SHORTEST", 1 if case.chunk == 16 else 2)
    monkeypatch.setattr(table, "INTERPRETED", dataclasses.replace(table.INTERPRETED, chunk=case.chunk))
    leaves = {n: given[n].detach().requires_grad_() for n in ("q", "k", "v", "q_norm", "k_norm", "log_decay", "weight", "S", "z")
              if given[n] is not None and n not in case.still}  # fmt: skip
    *arguments, S, z = (leaves.get(n, given[n]) for n in ("q", "k", "v", "q_norm", "k_norm", "log_decay", "weight", "S", "z"))
    kernel: Any = multiscale
    o, (S_end, z_end) = kernel(*arguments, (S, z), given["reset"], given["valid"])
    found = torch.autograd.grad([o, S_end, z_end], list(leaves.values()), [given["do"], given["dS"], given["dz"]])
    names = {"S": "dS", "z": "dz"}
    return {"o": o.detach(), "S": S_end.detach(), "z": z_end.detach()} | {names.get(n, n): g for n, g in zip(leaves, found, strict=True)}


def test_values_and_gradients(case: Case, device: str, monkeypatch: pytest.MonkeyPatch):
    given = inputs(case, device)
    found, exact, terms = run(case, given, monkeypatch), written_out(case, given), written_out(case, given, terms=True)
    assert set(found) == {"o", "S", "z"} | {n for n in NAMES if n in ("dS", "dz") or given[n] is not None} - case.still
    for name, a in found.items():
        assert a.dtype == (F32 if name in ("S", "z", "log_decay", "weight", "dS", "dz") else case.dtype), name
        judge.within(a.double().cpu(), exact[name].cpu(), budget(case, name, terms[name]).cpu(), name)


def test_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch):
    case = Case(1, 33, 1, 3, 3, 1, F32, data=True, pieces=True)
    given = inputs(case, device)
    first, again = (run(case, given, monkeypatch) for _ in range(2))
    assert all(torch.equal(a, again[name]) for name, a in first.items())


@pytest.mark.parametrize(
    "each",
    [
        Case(3, 20, 2, 4, 3, 2, F32, same=False, data=True, gates="head", reset=True, valid=True),
        Case(2, 20, 3, 3, 4, 2, F32, gates="token", packed=True),
        Case(1, 70, 3, 64, 64, 1, BF16, old=True),  # as on a Hopper GPU
    ],
    ids=str,
)
def test_parts_are_the_whole(each: Case, device: str, monkeypatch: pytest.MonkeyPatch):
    case = each
    given = inputs(case, device)
    whole = run(case, given, monkeypatch)
    monkeypatch.setattr(table, "LARGE", 0)
    monkeypatch.setattr(table, "WHOLE", 0)
    q, v = given["q"], given["v"]
    assert 2 <= len(parts.division(q, v, case.scales, True)) <= case.batch * case.heads
    found, exact, terms = run(case, given, monkeypatch), written_out(case, given), written_out(case, given, terms=True)
    for name, a in found.items():
        if name in ("log_decay", "weight"):  # added up in another order
            judge.within(a.double().cpu(), exact[name].cpu(), budget(case, name, terms[name]).cpu(), name)
        else:
            assert torch.equal(a, whole[name]), name


def test_what_a_segments_second_half_reads_of_its_first(device: str, monkeypatch: pytest.MonkeyPatch):
    """As on a Hopper GPU: half of a query's gradient comes of keys of the first half alone, whose terms add up and fade fast."""
    case = Case(1, 70, 1, 64, 64, 1, BF16, trend=True)
    given = inputs(case, device)
    given["log_decay"].fill_(-1)
    given["k"][:, :64, :, 32:] = 0
    given["k"][:, 64:, :, :32] = 0
    given["v"][:, :64], given["v"][:, 64:] = -1, 1
    found, exact, terms = run(case, given, monkeypatch), written_out(case, given), written_out(case, given, terms=True)
    for name, a in found.items():
        judge.within(a.double().cpu(), exact[name].cpu(), budget(case, name, terms[name]).cpu(), name)


@pytest.mark.parametrize("large", ["S", "z", "dS", "dz"])
def test_what_passes_through_a_chunk(large: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """As on a Hopper GPU: what nearly all comes of an initial state, or of a final one's gradient, which has faded along whole chunks."""
    case = Case(1, 150, 1, 64, 64, 1, BF16, fixed=True)
    given = inputs(case, device)
    given["log_decay"].fill_(-1 / 8)
    given["do"], given[large] = given["do"].abs(), 2**20 * given[large].abs()
    found, exact, terms = run(case, given, monkeypatch), written_out(case, given), written_out(case, given, terms=True)
    for name, a in found.items():
        judge.within(a.double().cpu(), exact[name].cpu(), budget(case, name, terms[name]).cpu(), name)


@pytest.mark.parametrize("length", [150, 520])
def test_what_fades_along_pieces(length: int, device: str, monkeypatch: pytest.MonkeyPatch):
    """As on a Hopper GPU: the final S and z, of positive terms, and their gradient by log λ. At 520 a piece has several segments."""
    case = Case(1, length, 1, 64, 64, 1, BF16)
    given = inputs(case, device)
    for name, value in (("OWN", math.inf), ("FEW", 1 << 20), ("PROGRAMS", 1 << 20), ("SHORTEST", 2 if length > 256 else 1)):
        monkeypatch.setattr(table, name, value)
    log_decay = torch.full((1, 1, 1), -0.002, device=device, requires_grad=length < 256)
    q, k, v, weight, S, z = (given[name] for name in ("q", "k", "v", "weight", "S", "z"))
    v, S = v.abs(), S.abs()
    _, (S_end, z_end) = multiscale(q, k, v, None, None, log_decay, weight, (S, z))
    rate = log_decay.detach().double().requires_grad_()
    kept = (torch.arange(length - 1, -1, -1, device=device) * rate[0, 0]).exp()[None, :, None, None]
    old = (length * rate[0]).exp()
    exact = torch.einsum("bthk,bthv->bhkv", k.double() * kept, v.double())[:, None] + old * S, (k * kept).sum(1)[:, None] + old * z
    pairs = [("S", S_end, exact[0]), ("z", z_end, exact[1])]
    if length < 256:
        found, true = (torch.autograd.grad(S.mean() + z.mean(), at)[0] for (S, z), at in (((S_end, z_end), log_decay), (exact, rate)))
        pairs.append(("log_decay", found, true))
    for name, found, true in pairs:
        judge.within(found.detach().double().cpu(), true.detach().cpu(), budget(case, name, true.detach()).cpu(), name)


def test_every_width_and_dtype_has_a_cut():
    assert set(table.TABLE) == {(product, width) for product in ("bfloat16", "float32") for width in (16, 32, 64, 128)}
    assert {table.width_of(K, V) for K in range(1, 129) for V in (1, 128)} == {16, 32, 64, 128}


def test_the_op_reaches_the_kernel(device: str):
    case = Case(1, 5, 1, 3, 4, 2, BF16)
    given = inputs(case, device)
    q, k, state = given["q"], given["k"], (given["S"], given["z"])
    o, _ = plain.parallel(q, k, given["v"], q, k, given["log_decay"], given["weight"], state, implementation="triton")
    assert o.dtype == BF16  # plain operations give float32
    judge.within(o.double().cpu(), written_out(case, given)["o"].cpu(), budget(case, "o", written_out(case, given, True)["o"]).cpu(), "o")


def test_operators_that_compilers_know(device: str):
    given = inputs(Case(1, 3, 1, 3, 4, 2, F32, same=False, data=True, reset=True), device)
    arguments = (*(given[n] for n in ("q", "k", "v", "q_norm", "k_norm", "log_decay", "weight", "S", "z", "reset", "valid")),)
    for a in arguments[:9]:
        a.requires_grad_()
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.unisono.multiscale.default, arguments, test_utils=("test_schema", "test_faketensor"))
    *_, denominator = torch.ops.unisono.multiscale(*arguments)
    back = (given["do"], given["dS"], given["dz"], denominator.detach(), *(a if a is None else a.detach() for a in arguments))
    for flags in ((True, True), (False, False)):
        both = *back, *flags  # of log λ and of weights
        torch.library.opcheck(torch.ops.unisono.multiscale_backward.default, both, test_utils=("test_schema", "test_faketensor"))


def test_second_derivatives(device: str):
    given = inputs(Case(1, 3, 1, 2, 2, 2, F32, data=True), device)
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v", "log_decay", "weight", "S", "z")]

    def twice(implementation: str) -> tuple[torch.Tensor, ...]:
        q, k, v, log_decay, weight, S, z = leaves
        o, _ = plain.parallel(q, k, v, q, k, log_decay, weight, (S, z), implementation=implementation)
        once = torch.autograd.grad(o, leaves, given["do"].to(o.dtype), create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in once]).sum(), leaves)

    for found, exact in zip(twice("triton"), twice("plain"), strict=True):
        judge.within(found.cpu(), exact.cpu(), numerics.formula("float32", 3, 1, gradient=True) * exact.abs().max().cpu())


def test_nothing_to_read(device: str):
    given = inputs(Case(1, 0, 1, 2, 2, 2, F32), device)
    q, k, v, state = given["q"], given["k"], given["v"], (given["S"], given["z"])
    o, (S, z) = multiscale(q, k, v, None, None, given["log_decay"], given["weight"], state)
    assert o.shape == (1, 0, 1, 2)
    assert torch.equal(S, given["S"])
    assert torch.equal(z, given["z"])


def test_bad_input_is_named(device: str):
    given = inputs(Case(1, 3, 1, 3, 4, 2, F32), device)
    q, k, v, decay, weight, state = *(given[n] for n in ("q", "k", "v", "log_decay", "weight")), (given["S"], given["z"])
    with pytest.raises(InputError, match="initial_state's z"):
        multiscale(q, k, v, None, None, decay, weight, (state[0], state[1][..., :2]))
    with pytest.raises(InputError, match="one dtype"):
        multiscale(q, k, v.bfloat16(), None, None, decay, weight, state)
    with pytest.raises(InputError, match="log_decay: got"):
        multiscale(q, k, v, None, None, decay[..., :1], weight, state)
    many = torch.zeros(1, 9, 1, 3, 4, device=device), torch.zeros(1, 9, 1, 3, device=device)
    nine = torch.zeros(1, 1, 9, device=device), torch.zeros(1, 3, 9, 1, 1, device=device)
    with pytest.raises(InputError, match="scales from 1 to 8, not 9"):
        plain.parallel(q, k, v, q, k, *nine, many, implementation="triton")
