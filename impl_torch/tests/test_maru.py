"""MARU: forms, gradients, marks, dtypes, learned initial memories, routing, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune
from unisono_conformance import judge, numerics
from unisono_spec.contract import count_params
from unisono_spec.contract.maru import MARUConfig
from unisono_torch.ops import mom_gru
from unisono_torch.ops.mom_gru_loop import SEGMENT

from .forms import (
    check_derivatives,
    check_dtypes,
    check_forms,
    check_gradients,
    check_poison,
    create,
    gradients,
    marks,
    midway,
    numbers,
    saved_bytes,
    tokens,
)

SMALL = MARUConfig(d_model=8, vocab_size=11, head_hidden=5, d_state=3, n_banks=2, n_slots=3, d_memory=4, router_hidden=5)
VARIANTS = {
    "coupled": SMALL,
    "separate": SMALL.replace(erase="separate", router="gumbel", temperature=0.7),
    "stack": SMALL.replace(prenorm=True, n_layers=2),
}
ALL = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


@ALL
@pytest.mark.parametrize("marked", [False, True])
def test_forms_and_steps_agree_across_a_handed_over_state(config: MARUConfig, marked: bool) -> None:
    check_forms(config, marked)


@ALL
def test_gradients_are_the_same_in_both_forms(config: MARUConfig) -> None:
    check_gradients(config)


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(config: MARUConfig, dtype: str) -> None:
    check_dtypes(config, dtype)


def case(length: int, device: str = "cpu"):
    """Both forms of the cell with marks and noise, and float inputs."""
    reset, valid = (mark.to(device) for mark in marks(length))
    model = create(VARIANTS["separate"])
    p = {name.removeprefix("layers.0.cell."): a.detach() for name, a in model.state_dict().items() if ".cell." in name}
    p["balance_bias"] = numbers(2)
    x, noise = numbers(2, length, 8, seed=length), numbers(2, length, 2, seed=1)
    h, M = numbers(2, 8, seed=2), numbers(2, 2, 3, 4, seed=3)

    def run(form: str, x: Tensor, noise: Tensor, h: Tensor, M: Tensor, *weights: Tensor, **how):
        given = x, {**p, **dict(zip(p, weights, strict=False))}, (h, M), reset, valid
        return getattr(mom_gru, "hoisted" if form == "parallel" else form)(*given, noise=noise, temperature=0.7, **how)

    return run, [a.to(device) for a in (x, noise, h, M, *p.values())], valid


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_segments_of_the_loop_with_gradients(device: str) -> None:
    """A GPU's second call replays what the first one recorded: other numbers, in the same shapes."""
    run, given, _ = case(2 * SEGMENT + 11, device)
    for scale in (1.0, 0.5):
        leaves = [(scale * a).requires_grad_() for a in given]
        found = {}
        for form in ("parallel", "recurrent"):
            out, (h, M) = run(form, *leaves)
            loss = (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype, device=device)[:, None]).sum() + h.sum() - M.square().sum()
            found[form] = [out, h, M, *torch.autograd.grad(loss, leaves, allow_unused=True)]
        judge.same(found["parallel"], found["recurrent"])
        with torch.no_grad():
            judge.same(run("parallel", *leaves)[0], found["recurrent"][0])


def test_gradcheck() -> None:
    run, given, _ = case(6)
    check_derivatives(run, given, chunk_size=4)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_what_is_not_valid_reaches_neither_outputs_nor_gradients(form: str) -> None:
    run, given, valid = case(20)
    check_poison(run, form, given, 2, valid, **({"chunk_size": 4} if form == "parallel" else {}))


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_noise_counts_in_training_only_and_alike_in_both_forms(form: str) -> None:
    model = create(VARIANTS["separate"])
    noise = [numbers(2, 9, 2)]
    with_noise = model.forward(tokens(9), noise=noise)[0]
    judge.same(model.forward(tokens(9), noise=noise, form=form)[0], with_noise)  # pyright: ignore[reportArgumentType]
    evaluated = model.forward(tokens(9))[0]
    assert judge.differ(evaluated, with_noise)
    model.get_buffer("layers.0.cell.balance_bias").add_(torch.tensor([1.0, -1.0]))
    assert torch.equal(model.forward(tokens(9))[0], evaluated)


def test_balancing_lowers_the_bias_of_a_busy_bank() -> None:
    bias, average = mom_gru.balanced(torch.zeros(2), torch.full((2,), 0.5), torch.tensor([1.0, 0.0]), rate=0.01)
    judge.same((average, bias), (torch.tensor([0.55, 0.45]), torch.tensor([-0.0005, 0.0005])), numerics.rounding("float32", 4))


def test_what_is_trained_is_what_is_counted() -> None:
    model = create(VARIANTS["separate"])
    assert sum(p.numel() for p in model.parameters()) == count_params(model.config)
    assert set(model.state_dict()) == set(model.config.params())


def test_a_reset_lets_gradients_flow_to_the_first_memory() -> None:
    model = create(SMALL)
    found = gradients(model, midway(model), "parallel")["layers.0.cell.memory"]  # the state is given: only resets lead here
    assert found.any()


def test_the_backward_keeps_few_memories() -> None:
    config = SMALL.replace(n_slots=500)
    per_token = (saved_bytes(config, 256) - saved_bytes(config, 128)) / (128 * 2)
    memory = 8 * config.n_banks * config.n_slots * config.d_memory
    assert per_token < memory / 4  # one of 32 is kept, and some activations


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("layer", ["router.0", "router.1", "query", "input", "hidden", "key", "value", "erase", "gate"])
def test_a_weight_that_is_computed_is_read_as_it_is(layer: str, pruned: bool) -> None:
    """The cell's layers are not called one by one: their weights go to the op by name."""
    plain, computed = create(VARIANTS["separate"]), create(VARIANTS["separate"])
    part: Any = computed.get_submodule(f"layers.0.cell.{layer}")
    if pruned:
        prune.l1_unstructured(part, "weight", amount=0.5)
    else:
        parametrize.register_parametrization(part, "weight", Doubled())
    plain.get_submodule(f"layers.0.cell.{layer}").weight = torch.nn.Parameter(part.weight.detach().clone())
    for form in ("parallel", "recurrent"):
        judge.same(computed(tokens(9), form=form)[0], plain(tokens(9), form=form)[0])
