"""What is computed in, inside torch.autocast and after `.to(dtype)`; and dropout under `.train()`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import unisono_torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from unisono_conformance import numerics
from unisono_conformance.adapters.torch import _call
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_spec.contract import InputError
from unisono_spec.contract.cram import CRAMConfig
from unisono_torch.arrays import from_numpy
from unisono_torch.ops import decayed_sum, precision

MODELS = [(case, variant) for case in cases().values() if isinstance(case, ModelCase) for variant in case.defaults]
OPS = [(case, variant) for case in cases().values() if not isinstance(case, ModelCase) for variant in case.variants]
MODEL = pytest.mark.parametrize(("case", "variant"), MODELS, ids=[f"{case.name}-{variant}" for case, variant in MODELS])
OP = pytest.mark.parametrize(("case", "variant"), OPS, ids=[f"{case.name}-{variant}" for case, variant in OPS])
NARROW = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def drawn(case: Any, variant: str) -> tuple[Any, Any]:
    draw = Draw(case=case.name, variant=variant, regime=case.regimes[0], length=9, seed=1)
    return case.setting(draw), case.inputs(draw, "float32")


def same(found: Any, truth: Any) -> None:
    assert_close(found, truth, rtol=0, atol=0)


@NARROW
@MODEL
def test_a_model_inside_autocast_is_the_model_of_that_dtype(case: Any, variant: str, narrow: torch.dtype) -> None:
    config, inputs = drawn(case, variant)
    model, tokens = unisono_torch.create(config, inputs.params), from_numpy(inputs.arrays["tokens"])
    truth = unisono_torch.create(config, inputs.params, dtype=str(narrow).removeprefix("torch."))
    for form in ("parallel", "recurrent"):
        expected = truth(tokens, form=form)
        with torch.autocast("cpu", dtype=narrow):
            found = model(tokens, form=form)
            stepped = model.step(tokens[:, 0], model.init_state(2, 9))
            model.zero_grad()
            found[0].float().square().sum().backward()  # inside, which PyTorch advises against
        truth.zero_grad()
        expected[0].float().square().sum().backward()
        same(found, expected)
        same([p.grad for p in model.parameters()], [p.grad for p in truth.parameters()])
        same(stepped, truth.step(tokens[:, 0], truth.init_state(2, 9)))
        for name, a in found[1].items():
            assert a.dtype in (torch.float32, torch.int32), name
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert p.grad.isfinite().all(), name
    wide = unisono_torch.create(config, inputs.params, dtype="float64")
    with torch.autocast("cpu", dtype=narrow):
        inside = wide(tokens)
    same(inside, wide(tokens))


@OP
def test_ops_inside_autocast_keep_their_digits(case: Any, variant: str) -> None:
    """Gradients too, though they are asked for inside."""
    settings, inputs = drawn(case, variant)
    given = {name: from_numpy(a) for name, a in {**inputs.arrays, **inputs.state, **inputs.params}.items()}
    leaves = [a.requires_grad_() for a in given.values() if a.is_floating_point()]

    def found(form: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
        result = _call(case.op, form, given, settings, "plain")
        floats = [a for a in tree_leaves(result) if a.requires_grad]
        upstream = [torch.linspace(-1, 2, a.numel()).reshape(a.shape).to(a.dtype) for a in floats]
        return result, torch.autograd.grad(floats, leaves, upstream, allow_unused=True, materialize_grads=True)

    for form in ("parallel", "recurrent"):
        truth = found(form)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(found(form), truth)


def test_what_stands_around_an_op_is_cast_as_before() -> None:
    """On the way back inside torch.autocast, which an op alone leaves."""
    weight, state = torch.rand(3, 3, requires_grad=True), torch.zeros(2, 3)
    before, after = [], []

    def seen(x: torch.Tensor, by: list[bool]) -> torch.Tensor:
        x.register_hook(lambda gradient: by.append(torch.is_autocast_enabled("cpu")))
        return x

    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = seen(torch.rand(2, 5, 3) @ weight, before)
        y = seen(decayed_sum.parallel(x.float(), 0.5, state)[0], after)
        (y @ weight).float().sum().backward()
        assert torch.is_autocast_enabled("cpu")
    assert (before, after) == ([True], [True])


def test_a_second_way_back_inside_autocast_takes_no_more_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, one = [], precision._one_uncast
    monkeypatch.setattr(precision, "_one_uncast", lambda kind, gradients=None: calls.append(kind) or one(kind))
    x, found = torch.rand(2, 5, 3, requires_grad=True), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = decayed_sum.parallel(x * 2, 0.5, torch.zeros(2, 3))[0].sum()
        for _ in range(3):
            before = len(calls)
            (slope,) = torch.autograd.grad(y, x, retain_graph=True)
            found.append((slope, len(calls) - before))
    assert found[0][1] > 1
    assert all(torch.equal(slope, found[0][0]) and count == found[0][1] for slope, count in found)


def test_cram_remembers_21_tokens_inside_autocast() -> None:
    """ξ and what reads it: bfloat16 would hold 8."""
    model = unisono_torch.create(CRAMConfig(d_model=8, n_layers=1, code_bits=4, vocab_size=16))
    tokens = torch.zeros(2, 22, dtype=torch.long)
    tokens[1, 0] = 15
    seen: list[torch.Tensor] = []
    model.input.register_forward_hook(lambda module, given, out: seen.extend((given[0], out)))  # pyright: ignore
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        logits, _ = model(tokens)
        xi = decayed_sum.parallel(model.code(tokens), 0.5, torch.zeros(2, 4))[0]  # pyright: ignore
        model.readout(xi)  # pyright: ignore
    assert logits.dtype == torch.bfloat16
    for read in (xi, *seen):
        assert read.dtype == torch.float32
        assert not torch.equal(read[0, 20], read[1, 20])


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@MODEL
def test_casting_changes_what_is_computed_in(case: Any, variant: str, form: str) -> None:
    config, inputs = drawn(case, variant)
    tokens = from_numpy(inputs.arrays["tokens"])
    for name, cast in {
        "bfloat16": lambda m: m.to(torch.bfloat16),
        "float16": lambda m: m.half(),
        "float64": lambda m: torch.nn.Sequential(m).double()[0],
        "float32": lambda m: m.bfloat16().float(),
    }.items():
        model = cast(unisono_torch.create(config, inputs.params))
        held = unisono_torch.numpy_params(model)
        truth = unisono_torch.create(config, held, dtype=name, param_dtype=name)
        assert model.dtype == name
        same(model(tokens, form=form), truth(tokens, form=form))
        same(model.init_state(1, 4), truth.init_state(1, 4))
    model = unisono_torch.create(config, inputs.params, dtype="bfloat16")
    for moved in (model.to("cpu"), model.to("cpu", non_blocking=True), copy.deepcopy(model), model.requires_grad_(False)):
        assert moved.dtype == "bfloat16"
    with pytest.raises(InputError, match="dtype: 'float8_e5m2' is not supported"):
        model.to(torch.float8_e5m2)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@MODEL
def test_dropout_acts_in_training_alone(case: Any, variant: str, form: str) -> None:
    config, inputs = drawn(case, variant)
    config = config.replace(dropout=0.5)
    tokens = from_numpy(inputs.arrays["tokens"])
    model = unisono_torch.create(config, inputs.params)
    assert not model.training  # as it is made and as it is loaded
    evaluated = model(tokens, form=form)
    same(model(tokens, form=form), evaluated)
    model.train()
    torch.manual_seed(0)
    first, second = model(tokens, form=form), model(tokens, form=form)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], evaluated[0])
    torch.manual_seed(1)  # torch's own generator is another
    model.generator.manual_seed(0)
    same(model(tokens, form=form), first)
    masks = [torch.ones(*tokens.shape[:2], config.d_model)] * config.n_updates
    same(model(tokens, form=form, dropout=masks), evaluated)
    same(copy.deepcopy(model).eval()(tokens, form=form), evaluated)
    same(unisono_torch.create(config.replace(dropout=0.0), inputs.params).train()(tokens, form=form), evaluated)
    same(model.generate(tokens, 2).tokens, model.eval().generate(tokens, 2).tokens)


def test_dropout_keeps_the_mean() -> None:
    model = unisono_torch.create(CRAMConfig(d_model=64, n_layers=3, code_bits=4, vocab_size=16, dropout=0.25)).train()
    masks = model._dropout((50, 40), None)
    assert masks is not None
    assert len(masks) == 3
    values, counts = torch.cat([m.flatten() for m in masks]).unique(return_counts=True)
    assert values.tolist() == [0.0, torch.tensor(4 / 3).item()]
    n = counts.sum().item()
    assert abs(counts[0].item() / n - 0.25) <= numerics.sampling(n) / 2  # a share of draws deviates by ½ at most
