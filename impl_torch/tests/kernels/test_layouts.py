"""What reaches an op besides contiguous arrays of some tokens: other strides and offsets, no tokens, no rows, some gradients, modes."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_conformance.adapter import flatten, grouped
from unisono_conformance.adapters.torch import _call
from unisono_conformance.cases import cases
from unisono_conformance.cases.draw import Draw
from unisono_spec.contract import InputError
from unisono_torch.arrays import from_numpy
from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops import activated_conv, gated_scan, mapped_attention, rotary, short_conv, softmax_attention, window

LENGTH = 5 if interpreted() else 70
# their kernels cost an interpreter seconds a call: there their plain forms are asked, on a GPU the kernels
LONG = ("multiscale", "mom_gru", "selective_scan", "diagonal_ssm", "gated_scan", "taylor2") if interpreted() else ()
FULL = 3  # tokens that a window and a cache hold before
WITHOUT = ("softmax_attention",)  # kernels
COURT = {
    "decayed_sum": ("cram/decayed_sum", "half"),
    "weighted_sum": ("cram/weighted_sum", "exclusive"),
    "linear_attention": ("lat/linear_attention", "normalised"),
    "multiscale": ("infinityformer/multiscale", "vector"),
    "mom_gru": ("maru/mom_gru", "coupled"),
    "selective_scan": ("mamba/selective_scan", "diagonal"),
    "diagonal_ssm": ("s4d/diagonal_ssm", "diagonal"),
}
# ops that are no case of the court by themselves: the op, shapes of its arrays, their beginning [B, T], those of states
OTHERS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int | str, ...]], dict[str, Any]]] = {
    "short_conv": (short_conv.parallel, {"x": ("B", "T", 5), "weight": (5, 1, 4), "bias": (5,), "initial_state": ("B", 3, 5)}, {}),
    "activated_conv": (activated_conv.parallel, {"x": ("B", "T", 5), "weight": (5, 1, 4), "bias": (5,), "initial_state": ("B", 3, 5)}, {}),
    "gated_scan": (
        gated_scan.parallel,
        {
            "u": ("B", "T", 5),
            "dt": ("B", "T", 5),
            "A": (5, 3),
            "B": ("B", "T", 3),
            "C": ("B", "T", 3),
            "D": (5,),
            "initial_state": ("B", 5, 3),
            "z": ("B", "T", 5),
        },
        {},
    ),
    "taylor2": (
        mapped_attention.parallel,
        {
            "q": ("B", "T", 2, 4),
            "k": ("B", "T", 2, 4),
            "v": ("B", "T", 2, 6),
            "initial_state.S": ("B", 2, 21, 6),
            "initial_state.z": ("B", 2, 21),
        },
        {"feature_map": "taylor2"},
    ),
    "rotary": (
        lambda **given: (rotary.turned(**given), ()),
        {"q": ("B", "T", 2, 4), "k": ("B", "T", 2, 4), "cos": ("B", "T", 2), "sin": ("B", "T", 2)},
        {"feature_map": "elu1"},
    ),
    "window": (
        window.parallel,
        {
            "q": ("B", "T", 2, 4),
            "k": ("B", "T", 2, 4),
            "v": ("B", "T", 2, 4),
            "initial_state.0": ("B", 3, 2, 4),
            "initial_state.1": ("B", 3, 2, 4),
            "initial_state.2": ("B",),
        },
        {},
    ),
    "softmax_attention": (
        softmax_attention.parallel,
        {
            "q": ("B", "T", 2, 4),
            "k": ("B", "T", 2, 4),
            "v": ("B", "T", 2, 4),
            "initial_state.0": ("B", 90, 2, 4),
            "initial_state.1": ("B", 90, 2, 4),
            "initial_state.2": ("B",),
        },
        {},
    ),
}
NAMES = (*COURT, *OTHERS)
Tree = dict[str, Tensor]
Op = Callable[[Tree], tuple[Tensor, ...]]  # arrays by name → outputs and the final state
# of a sum of so many numbers
LIMIT = numerics.rounding("float32", 2**10)


def made(name: str, device: str, batch: int = 2, length: int = LENGTH) -> tuple[Op, Tree]:
    """An op, by its kernel where it has one, and what to give it."""
    implementation = "plain" if name in WITHOUT or (name in LONG and length) else "triton"
    if name in COURT:
        case: Any = cases()[COURT[name][0]]
        draw = Draw(case=case.name, variant=COURT[name][1], regime=case.regimes[0], batch=2, length=LENGTH, chunk_size=8, seed=1)
        inputs, settings = case.inputs(draw, "float32"), case.setting(draw)
        given = {name: from_numpy(a, torch.device(device)) for name, a in {**inputs.arrays, **inputs.state, **inputs.params}.items()}
        sequences, rows = inputs.arrays, {**inputs.arrays, **inputs.state}
        given = {n: a[:batch, :length] if n in sequences else a[:batch] if n in rows else a for n, a in given.items()}
        return lambda tree: flat(_call(name, "parallel", tree, settings, implementation)), given
    op, shapes, how = OTHERS[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    sizes = {"B": batch, "T": length}
    given = {}
    for key, shape in shapes.items():
        size = [sizes[n] if isinstance(n, str) else n for n in shape]
        a = torch.rand(size, generator=generator) - (0.0 if key in ("dt", "initial_state.z") else 0.5)
        if key in ("initial_state.0", "initial_state.1"):  # of which FULL slots hold something
            a[:, FULL:] = 0
        given[key] = (torch.full(size, FULL, dtype=torch.int32) if key == "initial_state.2" else -a.exp() if key == "A" else a).to(device)
    return lambda tree: flat(op(**grouped(tree), **how, implementation=implementation)), given


def flat(found: tuple[Any, Any]) -> tuple[Tensor, ...]:
    o, state = found
    return *(o if isinstance(o, tuple) else (o,)), *flatten(state)


def gradients(
    op: Op, given: Tree, wanted: tuple[str, ...], lay: Callable[[Tensor], Tensor] = Tensor.clone
) -> tuple[tuple[Tensor, ...], Tree]:
    """What comes out, and how the sum of its squares moves with `wanted`, which are leaves of their own strides; lay: what comes back."""
    given = {n: a.detach().requires_grad_(n in wanted) for n, a in given.items()}
    found = op(given)
    moved, leaves = [a for a in found if a.requires_grad], [given[n] for n in wanted]
    upstream = [lay(2 * a.detach()) for a in moved]
    slopes = torch.autograd.grad(moved, leaves, upstream, allow_unused=True, materialize_grads=True) if leaves else ()
    return tuple(a.detach() for a in found), dict(zip(wanted, slopes, strict=True))


def floats(given: Tree) -> tuple[str, ...]:
    return tuple(n for n, a in given.items() if a.is_floating_point())


def turned(a: Tensor) -> Tensor:
    return a.transpose(0, -1).contiguous().transpose(0, -1) if a.ndim > 1 else a


def offset(a: Tensor) -> Tensor:
    """Three numbers into its memory, so that it begins at no multiple of 16 bytes."""
    return torch.cat([a.new_full((3,), 9), a.flatten()])[3:].view(a.shape)


def gaps(a: Tensor) -> Tensor:
    return torch.stack([torch.full_like(a, 9), a], -1)[..., 1]


def of_a_wider_row(a: Tensor) -> Tensor:
    return torch.cat([torch.full_like(a, 9), a], -1)[..., a.shape[-1] :] if a.ndim else a


def of_a_longer_sequence(a: Tensor) -> Tensor:
    """Sequences that do not lie end to end."""
    return torch.cat([a, torch.full_like(a, 9)], 1)[:, : a.shape[1]] if a.ndim > 1 else a


LAYS = of_a_longer_sequence, of_a_wider_row, turned, offset, gaps


@pytest.mark.parametrize("first", range(1 if interpreted() else len(LAYS)))
@pytest.mark.parametrize("name", NAMES)
def test_strides_change_nothing(name: str, first: int, device: str) -> None:
    """Arrays and marks that lie in memory in five ways, in turns, and what comes back. Nor do calls change what they are given."""
    op, given = made(name, device)
    if name != "rotary":
        marks = torch.rand(2, 2, LENGTH, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
        given |= {"reset": ~marks[0], "valid": marks[1]}
    true = gradients(op, given, floats(given))
    laid = {n: LAYS[(first + i) % len(LAYS)](a) for i, (n, a) in enumerate(given.items())}
    found = gradients(op, laid, floats(given), turned)
    judge.same(*([tuple(a.cpu() for a in each[0]), {n: a.cpu() for n, a in each[1].items()}] for each in (found, true)), limit=LIMIT)
    assert all(torch.equal(laid[n], a) for n, a in given.items())


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_share_their_memory(name: str, device: str) -> None:
    op, given = made(name, device)
    alone = [n for n, a in made(name, device, 1)[1].items() if a.shape != given[n].shape]
    given = {n: a[:1].expand_as(a) if n in alone else a for n, a in given.items()}
    apart = {n: a.clone(memory_format=torch.contiguous_format) for n, a in given.items()}
    found, true = (gradients(op, each, floats(given)) for each in (given, apart))
    judge.same(*([tuple(a.cpu() for a in each[0]), {n: a.cpu() for n, a in each[1].items()}] for each in (found, true)), limit=LIMIT)


@pytest.mark.parametrize("name", [n for n in OTHERS if n not in LONG + WITHOUT])
def test_more_sequences_than_a_second_axis_counts(name: str, device: str, grids: list[tuple[int, ...]]) -> None:
    """Programs beyond 65,535 lie along a grid's first axis."""
    op, given = made(name, device, 2 if interpreted() else 70_000, 2)
    found = op(given)
    assert all(set(grid[1:]) <= {1} for grid in grids)
    last = op({n: a[-1:] if shape[0] == "B" else a for (n, a), shape in zip(given.items(), OTHERS[name][1].values(), strict=True)})
    judge.same([a[-1:].cpu() for a in found], [a.cpu() for a in last], LIMIT)


@pytest.mark.parametrize(("batch", "length"), [(0, LENGTH), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_no_tokens(name: str, batch: int, length: int, device: str) -> None:
    """Of no rows nothing comes out; no tokens are refused, but by what has no state."""
    op, given = made(name, device, batch, length)
    if length == 0 and name != "rotary":
        with pytest.raises(InputError, match="T is 0; give at least one token"):
            op(given)
        return
    found, slopes = gradients(op, given, floats(given))
    states = [a for n, a in given.items() if n.startswith("initial_state")]
    count = len(found) - len(states)
    assert all(a.shape[:2] == (batch, length) for a in found[:count])
    for a, b in zip(found[count:], states, strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    for n, a in given.items():
        if n in slopes:
            assert slopes[n].shape == a.shape
            judge.same(slopes[n].cpu(), (2 * a if n.startswith("initial_state") else torch.zeros_like(a)).cpu(), LIMIT, n)


@pytest.mark.parametrize("mark", ["reset", "valid"])
@pytest.mark.parametrize("name", ["window", "short_conv"])
def test_marks_of_no_tokens(name: str, mark: str, device: str) -> None:
    op, given = made(name, device, length=0)
    with pytest.raises(InputError, match="T is 0; give at least one token"):
        op({**given, mark: torch.ones(2, 0, dtype=torch.bool, device=device)})


@pytest.mark.parametrize("name", NAMES)
def test_some_gradients_are_those_of_all(name: str, device: str) -> None:
    op, given = made(name, device)
    outputs, slopes = gradients(op, given, floats(given))
    some = floats(given) if not interpreted() else floats(given)[:3]
    for wanted in ((), *((n,) for n in some)):
        found, few = gradients(op, given, wanted)
        judge.same(tuple(a.cpu() for a in found), tuple(a.cpu() for a in outputs), LIMIT)
        judge.same({n: a.cpu() for n, a in few.items()}, {n: slopes[n].cpu() for n in wanted}, LIMIT)


@pytest.mark.parametrize("name", NAMES)
def test_modes(name: str, device: str) -> None:
    """autocast keeps an op's digits, inference mode its numbers; torch.func is refused by the kernel's name."""
    op, given = made(name, device)
    true = tuple(a.cpu() for a in op(given))
    with torch.autocast(device, dtype=torch.bfloat16):
        found = tuple(a.cpu() for a in op(given))
    assert [a.dtype for a in found] == [a.dtype for a in true]
    judge.same(found, true, LIMIT)
    with torch.inference_mode():
        judge.same(tuple(a.clone().cpu() for a in op(copy.deepcopy(given))), true, LIMIT)
    if name in LONG + WITHOUT:
        return
    with pytest.raises(InputError, match=r"torch\.func"):
        torch.func.vmap(lambda a: op({**given, floats(given)[0]: a})[0])(given[floats(given)[0]][None])
