"""RoPE's kernels, with a feature map before or after them, against plain operations in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_torch.ops import multiscale, rotary

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
# Products of an entry, its turn and a slope, and what they add up to, in float32 or wider; each result is rounded to the dtype once
INSIDE = 2**4


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    width: int
    dtype: torch.dtype
    feature_map: str = "none"
    numerator: bool = False
    packed: bool = False  # q and k are slices of one tensor
    shared: bool = False  # one row of positions for the batch


SMALL = (
    Case(2, 5, 3, 8, F32),
    Case(1, 7, 2, 6, BF16, "elu1", packed=True),
    Case(2, 9, 1, 16, F16, "relu", shared=True),
    Case(2, 3, 2, 10, F32, "learned"),
    Case(2, 6, 3, 8, BF16, "elu1", numerator=True),
    Case(1, 11, 2, 2, F32, "learned", numerator=True, packed=True),
)
LARGE = (
    Case(3, 1000, 16, 64, BF16, packed=True),
    Case(2, 333, 5, 128, BF16, "elu1"),
    Case(2, 333, 5, 48, F32, "learned", numerator=True),
    Case(70_000, 3, 1, 16, BF16, "elu1"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", SMALL + LARGE if metafunc.config.getoption("device", None) == "cuda" else SMALL, ids=str)


def given(case: Case, device: str) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """q, k and τ; cos and sin; cotangents. One token of q and k is padding: NaN, whose cotangent is 0."""
    made = torch.Generator().manual_seed(case.length)
    shape = case.batch, case.length, case.heads, case.width
    q, k, *cotangents = (torch.randn(shape, generator=made).to(device, case.dtype) for _ in range(6))
    for a in (q, k):
        a[:, 0, :, :: case.width // 2] = 0  # a pair where slopes jump
    for a in (q, k, *cotangents):
        a[:, 1] = math.nan if a is q or a is k else 0.0
    if case.packed:
        q, k = (a.unflatten(-1, (case.heads, -1)) for a in torch.cat([q.flatten(2), k.flatten(2)], -1).chunk(2, -1))
    position = torch.randint(0, 2**31 - 1, (1 if case.shared else case.batch, case.length), generator=made, dtype=torch.int32)
    cos, sin = rotary.cos_sin(position.to(device), case.width)
    return [q, k, torch.tensor([1.5], device=device)], cos, sin, cotangents[: 4 if case.numerator else 2]


def run(case: Case, leaves: list[Tensor], cos: Tensor, sin: Tensor, cotangents: list[Tensor], how: str) -> dict[str, Tensor]:
    leaves = [a.detach().requires_grad_() for a in leaves]
    q, k, tau = leaves
    outputs = rotary.turned(q, k, cos, sin, case.feature_map, tau, case.numerator, how)[: len(cotangents)]
    wanted = leaves if case.feature_map == "learned" else leaves[:2]
    found = torch.autograd.grad(outputs, wanted, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    names = "q", "k", "q_norm", "k_norm"
    return {n: a.detach() for n, a in (*zip(names, outputs, strict=False), *zip(("dq", "dk", "dtau"), found, strict=False))}


def test_values_and_gradients(case: Case, device: str) -> None:
    leaves, cos, sin, cotangents = given(case, device)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    try:
        found = run(case, leaves, cos, sin, cotangents, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    wide, wide_cotangents = [a.double().nan_to_num(0.0) for a in leaves], [a.double() for a in cotangents]
    exact = run(case, wide, cos.double(), sin.double(), wide_cotangents, "plain")
    dtype = str(case.dtype).removeprefix("torch.")
    # entries of a pair, whose terms may cancel: each errs by the size of both
    size = max(float(a.abs().max()) for a in (*wide, *wide_cotangents))
    for name, a in found.items():
        assert a.dtype == (F32 if name == "dtau" else case.dtype)
        seen = a.double().cpu() if name == "dtau" else a.double().cpu()[:, [0, *range(2, case.length)]]
        truth = exact[name].cpu() if name == "dtau" else exact[name].cpu()[:, [0, *range(2, case.length)]]
        terms = torch.full_like(truth, 4 * (1 + size) ** 2)
        if name == "dtau":
            terms = terms * leaves[0].numel()
        budget = numerics.rounding("float32", INSIDE) * terms
        if name != "dtau":
            truncated = case.dtype == BF16 and device == "cpu"  # by Triton's interpreter
            budget = budget + numerics.rounding(dtype, 2 if truncated else 1) * truth.abs()
            if name.startswith("d"):
                assert bool((a[:, 1] == 0).all())
        judge.within(seen, truth, budget, name)


def test_second_derivatives_are_those_of_plain_operations(device: str) -> None:
    leaves, cos, sin, cotangents = given(SMALL[3], device)
    leaves = [a.nan_to_num(0.5) for a in leaves]

    def twice(how: str) -> tuple[Tensor, ...]:
        x = [a.detach().requires_grad_() for a in leaves]
        q, k, tau = x
        outputs = rotary.turned(q, k, cos, sin, "learned", tau, False, how)[:2]
        first = torch.autograd.grad(outputs, x, cotangents, create_graph=True)
        return torch.autograd.grad([a.square().sum() for a in first], x)

    for a, b in zip(twice("triton"), twice("plain"), strict=True):
        judge.same(a.cpu(), b.cpu())


@pytest.mark.parametrize("at_once", [False, True])
def test_tau_has_a_gradient_where_it_is_learned_alone(at_once: bool, device: str) -> None:
    """At once: by the operator that it has with multi-scale attention."""
    (q, k, _), cos, sin, _ = given(SMALL[0], device)
    tau, width = torch.ones(1, device=device, requires_grad=True), q.shape[-1]
    S, z = (torch.zeros(len(q), 1, q.shape[2], width, *more, device=device) for more in ((width,), ()))
    rest = torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, 1, 1, 1, device=device), (S, z)
    for name, whether in (("elu1", False), ("learned", True)):
        if at_once:
            turn = rotary.Turn(cos, sin, "triton")
            qkv = torch.stack((q, k, k), 2).detach().requires_grad_()
            o, _ = multiscale.turned(qkv, turn, name, tau, False, *rest, implementation="triton")
        else:
            o = rotary.turned(q.requires_grad_(), k, cos, sin, name, tau, implementation="triton")[0]
        (slope,) = torch.autograd.grad(o.sum(), [tau], allow_unused=True)
        assert (slope is not None) == whether


def test_bad_calls_are_named(device: str) -> None:
    (q, k, _), cos, sin, _ = given(SMALL[0], device)
    with pytest.raises(InputError, match="cos: got"):
        rotary.turned(q, k, cos[:, :2], sin, implementation="triton")
    with pytest.raises(InputError, match="q, k: got"):
        rotary.turned(q, k[:, :, :2], cos, sin, implementation="triton")
    with pytest.raises(InputError, match="sin: got"):  # of which a kernel would read the first sequence's alone
        rotary.turned(q, k, cos[:1], sin, implementation="triton")
    with pytest.raises(InputError, match="tau: got"):
        rotary.turned(q, k, cos, sin, "learned", torch.ones(8, device=device), implementation="triton")
    with pytest.raises(InputError, match="float64"):
        rotary.turned(q.double(), k.double(), cos.double(), sin.double(), implementation="triton")
