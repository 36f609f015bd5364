"""States hold their own bytes and no more: no parameter's, no other state's, no row of another, nothing of the sequence read."""

from __future__ import annotations

import io
from itertools import combinations
from typing import Any

import pytest
import torch
import unisono_torch
from torch import Tensor
from unisono_conformance.adapter import flatten
from unisono_conformance.adapters.torch import _call
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_spec.contract import preset, presets
from unisono_torch.arrays import from_numpy

from .forms import marks

LENGTH = 13  # longer than a chunk


def drawn(case: Any, variant: str, batch: int = 2, length: int = LENGTH) -> tuple[Any, Any]:
    draw = Draw(case=case.name, variant=variant, regime=case.regimes[0], batch=batch, length=length, chunk_size=8, seed=1)
    return case.setting(draw), case.inputs(draw, "float32")


MODELS = [(case, variant) for case in cases().values() if isinstance(case, ModelCase) for variant in case.variants]
OPS = [(case, variant) for case in cases().values() if not isinstance(case, ModelCase) for variant in case.variants]
MODEL = pytest.mark.parametrize(("case", "variant"), MODELS, ids=[f"{case.name}-{variant}" for case, variant in MODELS])
OP = pytest.mark.parametrize(("case", "variant"), OPS, ids=[f"{case.name}-{variant}" for case, variant in OPS])


def check(found: dict[str, Tensor], *others: Tensor) -> None:
    """`found` hold their bytes, and share them with nobody."""
    for name, a in found.items():
        assert a.untyped_storage().nbytes() == a.numel() * a.element_size(), name
    for a, b in [*combinations(found.values(), 2), *((a, b) for a in found.values() for b in others)]:
        assert not a.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@pytest.mark.parametrize("case", [case for case in cases().values() if isinstance(case, ModelCase)], ids=lambda case: case.name)
def test_states_of_inference_mode_go_on_outside_it(case: Any) -> None:
    """In training, read whole and by steps, with the same gradients; and back."""
    for variant in case.defaults:
        config, inputs = drawn(case, variant)
        model, tokens = unisono_torch.create(config, inputs.params), from_numpy(inputs.arrays["tokens"])
        found = []
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                _, state = model.step(tokens[:, 0], model.init_state(2, 3 * LENGTH))
            logits, end = model(tokens, state)
            stepped, _ = model.step(tokens[:, 0], state)
            gradients = torch.autograd.grad(
                (logits.sum() + stepped.sum()).sin(), list(model.parameters()), materialize_grads=True, allow_unused=True
            )
            with mode():
                found.append([logits, stepped, *gradients, *model(tokens[:, :3], end)[1].values()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@MODEL
def test_states_of_models_are_their_own(case: Any, variant: str) -> None:
    for batch, masks in ((1, (None, None)), (2, marks(LENGTH))):
        config, inputs = drawn(case, variant, batch)
        model = unisono_torch.create(config, inputs.params)
        given = from_numpy(inputs.arrays["tokens"])
        start = model.init_state(batch, 2 * LENGTH)
        held = list(model.state_dict().values())
        check(start, *held)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        for form in ("parallel", "recurrent"):
            for state in (start, None):
                logits, end = model.forward(given, state, *masks, form=form, chunk_size=8)
                check(end, *held, *start.values(), given, logits)
        logits, end = model.step(given[:, 0], start, *(None if m is None else m[:, 0] for m in masks))
        check(end, *held, *start.values(), given, logits)
        for a in [*start.values(), *end.values()]:
            a.zero_()
            a[-1] += 1  # one row alone
            assert not a[:-1].any()
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@OP
def test_states_of_ops_are_their_own(case: Any, variant: str) -> None:
    settings, inputs = drawn(case, variant)
    given = {name: from_numpy(a) for name, a in {**inputs.arrays, **inputs.state, **inputs.params}.items()}
    for masks in ({}, dict(zip(("reset", "valid"), marks(LENGTH), strict=True))):
        for form in ("parallel", "recurrent"):
            chunks = {"chunk_size": 4} if form == "parallel" else {}
            o, end = _call(case.op, form, {**given, **masks}, {**settings, **chunks}, "plain")
            check(dict(enumerate(flatten(end))), o, *given.values())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", [name for name in presets() if name.endswith("-1m")])
def test_a_stored_state_is_as_large_as_its_numbers(name: str) -> None:
    config: Any = preset(name)
    model = unisono_torch.create(config)
    given = torch.zeros(1, 128, config.code_size) if config.reads_frames else torch.zeros(1, 128, dtype=torch.long)
    with torch.no_grad():
        _, state = model(given)
    stored = io.BytesIO()
    torch.save(state, stored)
    numbers = sum(a.numel() * a.element_size() for a in state.values())
    assert stored.tell() <= numbers + 1024 * (1 + len(state))  # and a name, a shape and padding each


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_what_is_compiled_or_transformed_owns_its_states() -> None:
    case, variant = next((case, variant) for case, variant in MODELS if case.arch == "cram")
    config, inputs = drawn(case, variant)
    model = unisono_torch.create(config, inputs.params)
    given = from_numpy(inputs.arrays["tokens"])
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        check(compiled(given)[1], *model.state_dict().values())
    params = dict(model.named_parameters())
    found = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (given,))[1], (params,), (params,))[0]
    check(found, *params.values())
