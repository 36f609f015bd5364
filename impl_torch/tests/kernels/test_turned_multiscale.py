"""RoPE, φ and multi-scale attention of one array: what the two operators give, and one gradient of the array."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_torch.kernels.multiscale import operator, table
from unisono_torch.kernels.multiscale.turned import _plain
from unisono_torch.ops import multiscale, rotary

F32, BF16 = torch.float32, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    width: int
    dtype: torch.dtype
    feature_map: str = "elu1"
    marked: bool = False
    learns: bool = True  # whether decays do

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in dataclasses.astuple(self))


SMALL = (
    Case(2, 21, 2, 6, F32, "learned", marked=True),
    Case(1, 18, 3, 16, BF16, "relu"),
    Case(2, 70, 2, 64, BF16),  # as on a Hopper GPU
    Case(1, 130, 1, 64, BF16, "learned", learns=False),
    Case(1, 66, 1, 64, BF16, "relu", learns=False),
)
LARGE = (Case(3, 1000, 9, 64, BF16), Case(2, 333, 3, 128, BF16, "learned", marked=True), Case(4, 2048, 9, 64, BF16))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_as_apart:
        metafunc.parametrize("case", SMALL + LARGE if metafunc.config.getoption("device", None) == "cuda" else SMALL, ids=str)


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(case: Case, device: str, scales: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """What may have a gradient, and what has none."""
    made = torch.Generator().manual_seed(case.length)
    tokens, heads, width = (case.batch, case.length), case.heads, case.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    leaves = {
        "qkv": normal(*tokens, 3, heads, width).to(case.dtype), "tau": torch.tensor([1.25]) if case.feature_map == "learned" else None,
        "log_decay": -normal(1, 1, scales).abs() / 8, "weight": normal(*tokens, scales, 1, 1).abs() + 0.1,
        "S": normal(case.batch, scales, heads, width, width), "z": normal(case.batch, scales, heads, width).abs(),
    }  # fmt: skip
    cos, sin = rotary.cos_sin(torch.arange(case.length)[None], width)
    fixed = {
        "cos": cos.to(device), "sin": sin.to(device), "do": normal(*tokens, heads, width).to(device, case.dtype),
        "marks": [torch.rand(tokens, generator=made).to(device) < share if case.marked else None for share in (0.1, 0.8)],
    }  # fmt: skip
    return {name: None if a is None else a.to(device) for name, a in leaves.items()}, fixed


def found(case: Case, device: str, at_once: bool, still: bool | None = None) -> dict[str, Tensor]:
    """Outputs, and gradients by what they are of. still: whether kernels know that the first scale is, which it then is."""
    given, fixed = inputs(case, device)
    if still is not None:
        given["log_decay"][..., 0] = 0
    leaves: dict[str, Any] = {
        name: None if a is None else a.requires_grad_(name != "log_decay" or case.learns) for name, a in given.items()
    }
    qkv, tau, log_decay, weight, S, z = leaves.values()
    turn = rotary.Turn(fixed["cos"], fixed["sin"], "triton")
    if at_once:
        o, ends = multiscale.turned(
            qkv, turn, case.feature_map, tau, False, log_decay, weight, (S, z), *fixed["marks"], implementation="triton", still=bool(still)
        )
    else:
        q, k, v = qkv.unbind(2)
        q, k, *norms = turn(q, k, case.feature_map, tau)
        o, ends = multiscale.parallel(q, k, v, *norms, log_decay, weight, (S, z), *fixed["marks"], implementation="triton")
    wanted = {name: a for name, a in leaves.items() if a is not None and a.requires_grad}
    gradients = torch.autograd.grad([o, *ends], list(wanted.values()), [fixed["do"], *(torch.ones_like(a) for a in ends)])
    return {"o": o.detach(), "S_end": ends[0].detach(), "z_end": ends[1].detach(), **dict(zip(wanted, gradients, strict=True))}


def test_as_apart(case: Case, device: str):
    together, apart, bound = found(case, device, True), found(case, device, False), numerics.rounding("bfloat16", 4)
    assert list(together) == list(apart)
    for name, a in together.items():
        assert a.isfinite().all(), name
        assert a.dtype == apart[name].dtype, name
        if name == "qkv" and case.width == 64 and not case.marked and case.feature_map in table.TURNED:
            # turned back before a rounding, not after it, and by slopes found from what was rounded
            pairs = apart[name].double().unflatten(-1, (2, -1)).norm(dim=-2, keepdim=True).expand(*a.shape[:-1], 2, -1).flatten(-2)
            judge.within(a[:, :, :2].double().cpu(), apart[name][:, :, :2].double().cpu(), bound * pairs[:, :, :2].cpu(), name)
            a, apart[name] = a[:, :, 2], apart[name][:, :, 2]
        assert torch.equal(a, apart[name]), name


@pytest.mark.parametrize("case", [*SMALL[:1], *SMALL[2:3]], ids=str)
def test_a_scale_that_is_still(case: Case, device: str):
    """The same bits as where its decay is computed with and happens to be 0, but for the decay's gradient."""
    still, moving = (found(case, device, True, still) for still in (True, False))
    assert moving["log_decay"][..., 0].all()
    moving["log_decay"][..., 0] = 0
    for name, a in still.items():
        assert torch.equal(a, moving[name]), name


def test_gradients_lie_in_one_array(device: str, monkeypatch: pytest.MonkeyPatch):
    """None is copied where the kernels of a Hopper GPU serve."""
    given = []
    real = operator.gradients

    def recorded(*arguments: Any) -> tuple[Tensor, ...]:
        made = real(*arguments)
        given.append(made[:3])
        return made

    monkeypatch.setattr(operator, "gradients", recorded)
    case = Case(1, 66, 2, 64, BF16)
    dqkv = found(case, device, True)["qkv"]
    [made] = given
    apart = case.heads * case.width * dqkv.element_size()
    assert [a.data_ptr() for a in made] == [dqkv.data_ptr() + i * apart for i in range(3)]
    assert dqkv.is_contiguous()


@pytest.mark.parametrize("still", [False, True])
def test_second_derivatives_are_those_of_plain_operations(still: bool, device: str):
    case = Case(1, 5, 1, 4, F32, "learned")
    given, fixed = inputs(case, device)

    def curvature(function: Any) -> list[Tensor]:
        leaves = {name: None if a is None else a.detach().requires_grad_() for name, a in given.items()}
        qkv, tau, *rest = leaves.values()
        o = function(qkv, fixed["cos"], fixed["sin"], tau, case.feature_map, *rest, None, None, still)[0]
        of = [a for a in leaves.values() if a is not None]
        slopes = torch.autograd.grad(o.square().sum(), of, create_graph=True)
        return [a.cpu() for a in torch.autograd.grad(torch.cat([slope.flatten() for slope in slopes]).square().sum(), of)]

    for a, b in zip(curvature(torch.ops.unisono.turned_multiscale), curvature(_plain), strict=True):
        judge.same(a, b, limit=numerics.rounding("float32", 2**14))
