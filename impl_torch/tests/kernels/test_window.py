"""The kernels of attention over a window against a fold of tokens in float64: values, all gradients, marks, carried keys."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_torch.ops import window

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    K: int
    V: int
    window: int
    dtype: torch.dtype
    marks: str = ""  # reset, valid, both
    packed: bool = False  # q, k and v are slices of one tensor


SMALL = (
    Case(2, 5, 2, 3, 2, 3, F32, "both"),
    Case(1, 37, 1, 5, 7, 20, F32, "reset"),
    Case(2, 21, 1, 16, 16, 9, BF16, packed=True),
    Case(1, 3, 2, 4, 4, 18, F16, "valid"),
    Case(2, 18, 1, 4, 4, 2, F32, packed=True),
    Case(2, 3, 1, 4, 4, 9, F32),  # after which the window is not yet full
)
LARGE = (
    Case(2, 300, 3, 64, 64, 64, BF16, "both", packed=True),
    Case(2, 1000, 2, 64, 128, 100, BF16),
    Case(2, 200, 3, 20, 33, 70, F16, "both"),
    Case(1, 130, 2, 128, 128, 64, F32, "reset"),
    Case(70_000, 3, 1, 16, 16, 2, BF16),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", SMALL + LARGE if metafunc.config.getoption("device", None) == "cuda" else SMALL, ids=str)


def given(case: Case, device: str) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:
    """q, k, v, carried keys and values; how many there are; reset, valid. Tokens that are not valid are NaN."""
    made = torch.Generator().manual_seed(case.length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    row = case.batch, case.length
    reset, valid = (torch.rand(row, generator=made) < share for share in (0.1, 0.8))
    tokens = [normal(*row, case.heads, n) for n in (case.K, case.K, case.V)]
    if case.marks in ("valid", "both"):
        tokens = [torch.where(valid[..., None, None], a, math.nan) for a in tokens]
    tokens = [a.to(device, case.dtype) for a in tokens]
    if case.packed:
        widths = [case.heads * a.shape[-1] for a in tokens]
        tokens = [a.unflatten(-1, (case.heads, -1)) for a in torch.cat([a.flatten(2) for a in tokens], -1).split(widths, -1)]
    state = [normal(case.batch, case.window, case.heads, n).to(device) for n in (case.K, case.V)]
    if case.packed:
        state = [a.transpose(1, 3).contiguous().transpose(1, 3) for a in state]
    count = torch.randint(0, 2 * case.window, (case.batch,), generator=made, dtype=torch.int32).to(device)
    reset, valid = (m.to(device) if case.marks in (n, "both") else None for m, n in ((reset, "reset"), (valid, "valid")))
    return [*tokens, *state], count, reset, valid


def run(case: Case, leaves: list[Tensor], count: Tensor, reset: Tensor | None, valid: Tensor | None, how: str) -> dict[str, Tensor]:
    leaves = [a.detach().requires_grad_() for a in leaves]
    asked = (*leaves[:3], (*leaves[3:], count), reset, valid)
    o, (keys, values, after) = window.recurrent(*asked) if how == "recurrent" else window.parallel(*asked, implementation=how)
    outputs = {"o": o, "keys": keys, "values": values}
    upstream = [
        torch.linspace(-1, 1, a.numel(), dtype=torch.float64, device=a.device).reshape(a.shape).to(a.dtype) for a in outputs.values()
    ]
    if case.packed:
        upstream[0] = upstream[0].transpose(1, 3).contiguous().transpose(1, 3)  # whose channels lie apart
    found = torch.autograd.grad(list(outputs.values()), leaves, upstream)
    names = "dq", "dk", "dv", "dkeys", "dvalues"
    return {n: a.detach() for n, a in (*outputs.items(), ("count", after), *zip(names, found, strict=True))}


def test_values_and_gradients(case: Case, device: str) -> None:
    leaves, count, reset, valid = given(case, device)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    try:
        found, again = (run(case, leaves, count, reset, valid, "triton") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    exact = run(case, [a.double() for a in leaves], count, reset, valid, "recurrent")
    dtype = str(case.dtype).removeprefix("torch.")
    for name, a in found.items():
        assert torch.equal(a, again[name]), name
        assert a.dtype == {"count": torch.int32}.get(name, case.dtype if name in ("o", "dq", "dk", "dv") else F32)
        # of the largest: weights, what is carried, δ, do·o and the result are rounded to the dtype; the interpreter truncates
        budget = (numerics.rounding(dtype, 10) + numerics.rounding("float32", 2**8)) * float(exact[name].double().abs().max())
        judge.within(a.double().cpu(), exact[name].double().cpu(), torch.full(a.shape, budget, dtype=torch.float64), name)


def test_heads_sixteen_numbers_apart(device: str) -> None:
    """Strides that count sixteens, as those of what is carried do not: the same bits."""
    tensors, count, *_ = given(dataclasses.replace(SMALL[4], packed=False), device)

    def apart(a: Tensor) -> Tensor:
        return torch.cat([a, a.new_zeros(*a.shape[:-1], 16 - a.shape[-1])], -1)[..., : a.shape[-1]]

    found = []
    for lay in (torch.clone, apart):
        leaves = [a.detach().requires_grad_() for a in (*map(lay, tensors[:3]), *tensors[3:])]
        o, _ = window.parallel(*leaves[:3], (*leaves[3:], count), implementation="triton")
        found.append([o, *torch.autograd.grad(o, leaves, lay(torch.ones_like(o)))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_second_derivatives_are_those_of_plain_operations(device: str) -> None:
    leaves, *rest = given(SMALL[4], device)

    def twice(how: str) -> tuple[Tensor, ...]:
        x = [a.detach().requires_grad_() for a in leaves]
        o, _ = window.parallel(*x[:3], (*x[3:], rest[0]), *rest[1:], implementation=how)
        first = torch.autograd.grad(o.sin().sum(), x[:3], create_graph=True)
        return torch.autograd.grad([a.square().sum() for a in first], x[:3], materialize_grads=True)

    found = twice("triton")
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has none
        expected = twice("plain")
    for a, b in zip(found, expected, strict=True):
        judge.same(a.cpu(), b.cpu(), limit=numerics.rounding("float32", 2**8))


def test_bad_calls_are_named(device: str) -> None:
    (q, k, v, keys, values), count, *_ = given(SMALL[0], device)
    with pytest.raises(InputError, match=r"initial_state\[1\]: shape"):
        window.parallel(q, k, v, (keys, values[:, 1:], count), implementation="triton")
    with pytest.raises(InputError, match="float64"):
        window.parallel(q.double(), k.double(), v.double(), (keys, values, count), implementation="triton")
