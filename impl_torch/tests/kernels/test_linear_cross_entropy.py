"""Head and loss as one operator against float64: nats, gradients, padded columns, pieces of rows, what is not asked or not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_torch.kernels import linear_cross_entropy as kernel
from unisono_torch.ops import linear_cross_entropy as op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 513 / 2048  # what a training multiplies the sum by, in float32: 16 bits do not hold it
NONE = -100


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow vocabularies take the operator, too: rows of several blocks, the last of which is not full, in pieces of two and more."""
    monkeypatch.setattr(op, "_serves", lambda x, weight: x.dtype != torch.float64)
    for name, value in (("BLOCK", 128), ("TILE", 2), ("ROOM", 1800)):
        monkeypatch.setattr(kernel, name, value)


def made(vocabulary: int, device: str, biased: bool = True) -> Any:
    """x, weight, bias, targets: one is not asked, one the first id. Logits are integers that 16 bits hold."""
    drawn = torch.Generator().manual_seed(vocabulary)
    x, weight, bias = (
        torch.randint(-2, 3, shape, generator=drawn).double().to(device) for shape in ((2, 3, 6), (vocabulary, 6), (vocabulary,))
    )
    targets = torch.randint(0, vocabulary, (2, 3), generator=drawn)
    targets[0, 1], targets[1, 0] = NONE, 0
    apart = torch.stack([targets, torch.zeros_like(targets)], -1)[..., 0]  # every other number of the memory
    return [x, weight, bias if biased else None, apart.to(device)]


def both(given: Any, dtype: torch.dtype, held: torch.dtype | None = None) -> list[Tensor]:
    """The sum, nats, and gradients of the sum times SCALE by what there is of x, and of weight and bias, which are `held` in a dtype."""
    x, *weights, targets = given
    leaves = [x.to(dtype), *(None if a is None else a.to(held or dtype) for a in weights)]
    leaves = [None if a is None else a.detach().requires_grad_() for a in leaves]
    total, nats = op.linear_cross_entropy(*leaves, targets)
    assert not nats.requires_grad
    (total * SCALE).backward()
    return [a.detach().double().cpu() for a in (total, nats, *(leaf.grad for leaf in leaves if leaf is not None))]


def terms(given: Any) -> list[Tensor]:
    """What each number is a sum of, absolute: a share, and 1 for the target, times what it meets."""
    x, weight, bias, targets = given
    x, weight, bias, targets = x.cpu(), weight.cpu(), None if bias is None else bias.cpu(), targets.cpu()
    y = x @ weight.mT + (0 if bias is None else bias)
    asked = (targets >= 0).double()
    share = (y.softmax(-1) + torch.nn.functional.one_hot(targets.clamp(min=0), len(weight))) * asked[..., None] * SCALE
    nats = (y.logsumexp(-1).abs() + y.abs().amax(-1)) * asked
    found = [nats.sum(), nats, share @ weight.abs(), torch.einsum("btv,btd->vd", share, x.abs())]
    return found if bias is None else [*found, share.sum((0, 1))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "biased"), [(300, True), (150, False), (128, True), (40, False)])
def test_nats_and_gradients(dtype: torch.dtype, vocabulary: int, biased: bool, device: str) -> None:
    given = made(vocabulary, device, biased)
    found, exact = both(given, dtype), both(given, torch.float64)
    name = str(dtype).removeprefix("torch.")
    # exponents up to 2⁶ err by as many roundings; shares and gradients are rounded to the dtype, by the interpreter towards zero
    wide, narrow = numerics.rounding("float32", 2**8), numerics.rounding("float32", 2**8) + numerics.rounding(name, 4)
    for i, (a, e, size) in enumerate(zip(found, exact, terms(given), strict=True)):
        judge.within(a, e, (wide if i < 2 else narrow) * size + numerics.TINY[name], ("sum", "nats", "dx", "dweight", "dbias")[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_weights_are_rounded_once(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And wider weights' never: equal shares of 256 ids are exact in 16 bits. Shares that float16 itself holds badly keep its digits."""
    for name, value in (("BLOCK", 256), ("ROOM", 4000)):  # pieces of 8 rows and 6
        monkeypatch.setattr(kernel, name, value)
    x = torch.randint(-9, 10, (2, 7, 3), generator=torch.Generator().manual_seed(0)).double().to(device)
    weight, bias, targets = torch.zeros(256, 3).double().to(device), torch.zeros(256).double().to(device), torch.arange(14) // 13
    given = [x, weight, bias, targets.reshape(2, 7).to(device)]
    share = SCALE * (1 / 256 - torch.nn.functional.one_hot(targets, 256).double())
    for held in (dtype, torch.float32):
        for a, e in zip(both(given, dtype, held)[3:], (share.mT @ x.cpu().flatten(0, 1), share.sum(0)), strict=True):
            assert torch.equal(a, e.to(held).double())
    bias[100:] = -8
    budget = numerics.rounding(str(dtype).removeprefix("torch."), 2) + numerics.rounding("float32", 2**8)
    found, exact = both(given, dtype, torch.float32), both(given, torch.float64)
    for a, e, size in zip(found[3:], exact[3:], terms(given)[3:], strict=True):
        judge.within(a, e, budget * size)


def test_padded_columns_take_no_part_where_logits_are_far_below_them(device: str) -> None:
    """The product leaves 0 there: e⁰ beside e^−300, and over it infinity."""
    x, weight, bias, targets = made(40, device)
    given = [x, weight, bias - 300, targets]
    for a, e, size in zip(both(given, torch.float32), both(given, torch.float64), terms(given), strict=True):
        judge.within(a, e, numerics.rounding("float32", 2**9) * size + numerics.TINY["float32"])


def test_a_block_of_infinities_before_logits_far_below_0(device: str) -> None:
    """Columns that are −∞ change nothing, though they fill the first block; nor do those of the last, farther below than e^−89."""
    x, weight, bias, targets = made(300, device)
    targets = torch.where(targets < 0, targets, 128 + targets % 172)
    bias[128:] -= 300
    bias[256:] -= 300
    without = [x, weight[128:], bias[128:], torch.where(targets < 0, targets, targets - 128)]
    given = [x, weight, torch.cat([torch.full_like(bias[:128], -torch.inf), bias[128:]]), targets]
    total, nats, dx, dweight, dbias = both(given, torch.float32)
    assert not bool(dweight[:128].any())
    assert not bool(dbias[:128].any())
    for a, e, size in zip((total, nats, dx, dweight[128:], dbias[128:]), both(without, torch.float64), terms(without), strict=True):
        judge.within(a, e, numerics.rounding("float32", 2**9) * size + numerics.TINY["float32"])


def test_pieces_are_no_larger_than_there_is_room_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing as large as logits waits for the gradient."""
    seen, kept, launch = [], [], kernel._launch  # pyright: ignore[reportPrivateUsage]

    def noted(logits: Tensor, *rest: Any) -> None:
        seen.append((len(logits), logits.stride(0), rest[-1]))
        launch(logits, *rest)

    monkeypatch.setattr(kernel, "_launch", noted)
    monkeypatch.setattr(kernel, "TILE", 4)
    x, weight, _, targets = made(150, device)
    x, weight = x.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a.shape) or a, lambda a: a):
        op.linear_cross_entropy(x, weight, None, targets)
    assert seen == [(4, 192, True), (2, 192, True)]
    assert kept
    assert all(shape[-1:] != (150,) for shape in kept)
    assert kernel._padded(weight, 150) is weight  # pyright: ignore[reportPrivateUsage]
    seen.clear()
    with torch.no_grad():
        op.linear_cross_entropy(x, weight, None, targets)
    assert seen == [(4, 192, False), (2, 192, False)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("implementation", [op.linear_cross_entropy, op.plain])
def test_what_is_not_asked_reaches_nothing(implementation: Any, device: str) -> None:
    """Not even NaN; and of rows that are asked it reaches all."""
    x, weight, bias, targets = made(40, device)
    x = x.float()
    x[0, 1] = float("nan")
    leaves = [a.float().requires_grad_() for a in (x, weight, bias)]
    total, nats = implementation(*leaves, targets)
    total.backward()
    assert float(nats[0, 1]) == 0
    assert not bool(leaves[0].grad[0, 1].any())
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)
    for value in ("nan", "inf"):
        wrong = x.clone()
        wrong[0, 2] = float(value)
        assert bool(implementation(wrong, *leaves[1:], targets)[1][0, 2].isnan())


def test_an_id_outside_the_vocabulary_is_read_nowhere(device: str) -> None:
    x, weight, _, targets = made(40, device)
    targets[1, 2] = 40
    nats = op.linear_cross_entropy(x.float(), weight.float(), None, targets)[1]
    assert bool(nats[1, 2].isnan())
    assert int(nats.isnan().sum()) == 1


def test_a_gradient_asked_alone(device: str) -> None:
    """And ids of 32 bits: the same."""
    *given, targets = made(40, device)
    leaves = [a.float().requires_grad_() for a in given]
    every = torch.autograd.grad(op.linear_cross_entropy(*leaves, targets)[0], leaves)
    for i, expected in enumerate(every):
        alone = [a.detach().requires_grad_(i == j) for j, a in enumerate(leaves)]
        (found,) = torch.autograd.grad(op.linear_cross_entropy(*alone, targets.int())[0], alone[i])
        assert torch.equal(found, expected)


def test_a_row_alone(device: str) -> None:
    x, weight, bias, targets = (a.float() if a.is_floating_point() else a for a in made(40, device))
    for implementation in (op.linear_cross_entropy, op.plain):
        whole, alone = (implementation(x[at], weight, bias, targets[at])[1] for at in (0, (0, 2)))
        judge.same(alone.cpu(), whole[2].cpu(), limit=numerics.rounding("float32", 2**8))


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_nothing_costs_nothing(rows: tuple[int, ...], device: str) -> None:
    weight = torch.ones(5, 4, device=device, requires_grad=True)
    for implementation in (op.linear_cross_entropy, op.plain):
        total, nats = implementation(torch.ones(*rows, 4, device=device), weight, None, torch.zeros(rows, dtype=torch.int64, device=device))
        (slope,) = torch.autograd.grad(total, weight)
        assert float(total.detach()) == 0
        assert nats.shape == rows
        assert not bool(slope.any())


def test_traced_and_differentiated_as_pytorch_asks_of_an_operator(device: str) -> None:
    x, weight, bias, targets = made(70, device)
    leaves = [a.float().requires_grad_() for a in (x, weight, bias)]
    questions = ("test_schema", "test_autograd_registration", "test_faketensor")
    for given in ((*leaves, targets, True, True), (*leaves[:2], None, targets, False, False)):
        torch.library.opcheck(kernel.linear_cross_entropy, given, test_utils=questions)


def test_second_derivatives_and_transforms_are_those_of_plain_operations(device: str) -> None:
    x, weight, bias, targets = made(40, device)
    x, weight, bias = x.float(), weight.float(), bias.float()

    def curvature(function: Any) -> Tensor:
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf, weight, bias, targets)[0], leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    judge.same(curvature(op.linear_cross_entropy).cpu(), curvature(op.plain).cpu(), limit=numerics.rounding("float32", 2**8))


def test_bad_targets_are_named(device: str) -> None:
    x, weight, _, targets = made(40, device)
    for wrong in (targets[0], targets.double(), targets > 0):
        with pytest.raises(InputError, match=f"targets: {wrong.dtype}"):
            op.linear_cross_entropy(x, weight, None, wrong)
