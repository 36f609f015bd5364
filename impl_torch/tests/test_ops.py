"""The plain sequence ops: forms, marks, gradients, dtypes, rounding, cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_spec.contract.implementations import Implementation, table
from unisono_torch import InputError
from unisono_torch.kernels import registry
from unisono_torch.ops import decayed_sum, dispatch, position, weighted_sum

DECAYED, WEIGHTED, EXCLUSIVE = "decayed", "weighted", "exclusive"
KINDS = (DECAYED, WEIGHTED, EXCLUSIVE)
MARKS = ((False, False), (True, False), (False, True), (True, True))  # with reset, with valid


def inputs(length: int, width: int = 3, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x, s and an initial state that no form may forget."""
    generator = torch.Generator().manual_seed(length)
    x, s, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((batch, length, width), (batch, length), (batch, width))
    )
    return x.to(dtype), s.to(dtype), state.to(torch.promote_types(dtype, torch.float32))


def marks(length: int, with_reset: bool = True, with_valid: bool = True, batch: int = 2) -> tuple[Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(length + 1)
    reset, valid = torch.rand(batch, length, generator=generator) < 0.1, torch.rand(batch, length, generator=generator) < 0.7
    return reset if with_reset else None, valid if with_valid else None


def run(kind: str, form: str, x: Tensor, s: Tensor, state: Tensor, reset: Tensor | None, valid: Tensor | None, decay: float = 0.8, **how):
    if kind == DECAYED:
        return getattr(decayed_sum, form)(x, decay, state, reset, valid, **how)
    return getattr(weighted_sum, form)(x, s, state, reset, valid, exclusive=kind == EXCLUSIVE, **how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marked", MARKS)
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 64), (5, 64), (33, 8), (70, 1), (150, 2)])
def test_forms_agree(kind: str, marked: tuple[bool, bool], length: int, chunk_size: int) -> None:
    # (70, 1) and (150, 2) fill more than one chunk of the second level
    given = (*inputs(length), *marks(length, *marked))
    for found, truth in zip(run(kind, "parallel", *given, chunk_size=chunk_size), run(kind, "recurrent", *given), strict=True):
        judge.same(found, truth)


@pytest.mark.parametrize("decay", [1e-9, 0.5, 0.9999])
def test_forms_agree_at_extreme_decays(decay: float) -> None:
    given = (*inputs(200), *marks(200))
    for found, truth in zip(run(DECAYED, "parallel", *given, decay), run(DECAYED, "recurrent", *given, decay), strict=True):
        judge.same(found, truth)


@pytest.mark.parametrize("marked", MARKS)
def test_positions_count_valid_tokens_of_their_sequence(marked: tuple[bool, bool]) -> None:
    reset, valid = marks(40, *marked)
    state = torch.tensor([0, 7], dtype=torch.int32)
    found, final = position.parallel(state, 40, reset, valid)
    assert found.dtype == final.dtype == torch.int32
    for t in range(40):
        truth, state = position.step(state, *(None if m is None else m[:, t] for m in (reset, valid)))
        assert torch.equal(found[:, t], truth)
    assert torch.equal(final, state)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, form: str) -> None:
    x, s, state = (a.requires_grad_() for a in inputs(9, width=2))
    reset, valid = marks(9)
    how = {"chunk_size": 2} if form == "parallel" else {}

    def op(x: Tensor, s: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return run(kind, form, x, s, state, reset, valid, **how)

    given = (x, s.detach() if kind == DECAYED else s, state)
    assert torch.autograd.gradcheck(op, given)
    assert torch.autograd.gradgradcheck(op, given)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_valid_reaches_neither_outputs_nor_gradients(kind: str, form: str) -> None:
    x, s, state = inputs(40)
    reset, valid = marks(40)
    assert valid is not None
    clean = run(kind, form, x, s, state, reset, valid)
    x, s = x.masked_fill(~valid[..., None], float("nan")).requires_grad_(), s.masked_fill(~valid, float("nan")).requires_grad_()
    found = run(kind, form, x, s, state, reset, valid)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)
    (found[0].sum() + found[1].sum()).backward()
    for gradient in (x.grad, s.grad) if kind != DECAYED else (x.grad,):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert not gradient[~valid].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_float32_or_wider(kind: str, dtype: torch.dtype) -> None:
    given = (*inputs(70, dtype=dtype), *marks(70))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for form in ("parallel", "recurrent"):
        assert [a.dtype for a in run(kind, form, *given)] == [wide, wide]
    # 16-bit inputs are widened before anything is rounded, so the result is that of the widened inputs, to the bit
    x, s, state, reset, valid = given
    widened = run(kind, "parallel", x.to(wide), s.to(wide), state.to(wide), reset, valid)
    assert torch.equal(run(kind, "parallel", *given)[0], widened[0])


@pytest.mark.parametrize(("kind", "decay"), [(DECAYED, 0.5), (DECAYED, 0.9999), (WEIGHTED, 1.0)])
def test_float32_rounding_at_length_100_000(kind: str, decay: float) -> None:
    length = 100_000
    x, s, state = inputs(length, width=2, dtype=torch.float32, batch=1)
    found = run(kind, "parallel", x, s, state, None, None, decay)[0].double()
    x, s, state = x.double(), s.double(), state.double()
    truth = run(kind, "parallel", x, s, state, None, None, decay)[0]
    terms = run(kind, "parallel", x, s.abs(), state.abs(), None, None, decay)[0]  # sums of magnitudes
    judge.within(found, truth, numerics.formula("float32", length) * terms)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_memory_is_linear_in_length(kind: str) -> None:
    def saved(length: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        x, s, state = (a.requires_grad_() for a in inputs(length, width=4))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(kind, "parallel", x, s, state, *marks(length))
        return sum(sizes.values())

    assert saved(16384) < 5 * saved(4096)  # 16 times, were there a T×T tensor


def test_an_implementation_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*inputs(3), None, None)
    with pytest.raises(InputError, match=r"'pallas'.*plain"):
        run(DECAYED, "parallel", *given, implementation="pallas")
    monkeypatch.setattr("unisono_torch.kernels.registry.available", lambda device: False)
    with pytest.raises(InputError, match="'triton' cannot run on cpu; use 'auto' or 'plain'"):
        run(WEIGHTED, "parallel", *given, implementation="triton")


def test_auto_says_once_why_it_is_plain(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._tell.cache_clear()
    with caplog.at_level("DEBUG", logger="unisono_torch"):
        for _ in range(2):
            assert not dispatch.use_triton("auto", "softmax_attention", torch.device("cpu"), torch.float32)
            assert not dispatch.use_triton("plain", "short_conv", torch.device("cpu"), torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "softmax_attention: plain tensor operations, since there is no Triton kernel of softmax_attention; use 'auto' or 'plain'"
    ]


def test_the_registry_says_what_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    here, kernel = torch.device("cuda"), Implementation("op", "triton", (torch.float32,), {"K": (16, 256)}, {"map": ("relu",)})
    monkeypatch.setattr(registry, "available", lambda device: True)
    assert registry.why_not(kernel, here, torch.float32, {"K": 16}, {"map": "relu"}) is None
    for why, given in {
        "in float32, not in int8": (torch.int8, {"K": 16}, {"map": "relu"}),
        "K from 16 to 256, not 8": (torch.float32, {"K": 8}, {"map": "relu"}),
        "map of .*, not 'elu1'": (torch.float32, {"K": 256}, {"map": "elu1"}),
    }.items():
        assert re.search(why, registry.why_not(kernel, here, *given) or "")


def test_the_page_of_kernels_is_the_registry() -> None:
    page = Path(__file__).parents[2] / "docs" / "kernels.md"
    assert table(registry.IMPLEMENTATIONS) in page.read_text("utf-8")
