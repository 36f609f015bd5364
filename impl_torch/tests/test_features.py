"""Linear attention of q and k before φ: what they hold where a token is not valid reaches nothing, τ neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from unisono_conformance import judge
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_torch.layers.infinityformer import Mixer
from unisono_torch.ops import mapped_attention, multiscale, rotary
from unisono_torch.ops.features import feature_map
from unisono_torch.ops.fold import fold

from .forms import marks, numbers

T = 7
MAPS = pytest.mark.parametrize("name", ["elu1", "relu", "taylor2", "learned"])


def check(run: Callable[..., tuple[Tensor, tuple[Tensor, ...]]], given: list[Tensor], valid: Tensor) -> None:
    """`given` [B, T, …], but for the last, τ: outputs, states and gradients are those of zeros where nothing is valid."""
    assert not valid.all()

    def found(hole: float) -> list[Tensor]:
        leaves = [torch.where(valid.reshape(*valid.shape, *(1,) * (a.ndim - 2)), a, hole) for a in given[:-1]]
        leaves = [a.requires_grad_() for a in (*leaves, given[-1].clone())]
        o, state = run(*leaves)
        gradients = torch.autograd.grad(o.sum() + sum(a.sum() for a in state), leaves, materialize_grads=True, allow_unused=True)
        return [a.detach() for a in (o, *state, *gradients)]

    clean = found(0.0)
    for hole in (torch.nan, torch.inf, -torch.inf):
        judge.same(found(hole), clean, 0)


@MAPS
@pytest.mark.parametrize("form", ["parallel", "step"])
def test_of_mapped_attention(name: str, form: str) -> None:
    reset, valid = marks(T)
    q, k, v = numbers(3, 2, T, 2, 3)
    features = feature_map(name, q, torch.ones(1)).shape[-1]
    state = torch.zeros(2, 2, features, 3, dtype=torch.float64), torch.zeros(2, 2, features, dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if form == "parallel":
            how = {"chunk_size": 3, "implementation": "plain"}
            return mapped_attention.parallel(q, k, v, state, reset, valid, name, tau, **how)
        return fold(lambda *given: mapped_attention.step(*given, name, tau), (q, k, v), state, reset, valid)

    check(run, [q, k, v, torch.full((1,), 1.5, dtype=torch.float64)], valid)


@pytest.mark.parametrize("name", ["elu1", "relu", "learned"])
@pytest.mark.parametrize("numerator", [False, True])
def test_of_heads_that_are_turned(name: str, numerator: bool) -> None:
    reset, valid = marks(T)
    weight, log_decay = numbers(2, T, 2, 1, 1, seed=1), -numbers(1, 1, 2, seed=2).abs()
    state = torch.zeros(2, 2, 2, 4, 4, dtype=torch.float64), torch.zeros(2, 2, 2, 4, dtype=torch.float64)
    turn = rotary.Turn(*rotary.cos_sin(torch.arange(T)[None], 4, dtype=torch.float64), "plain")

    def run(qkv: Tensor, tau: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        given = qkv, turn, name, tau, numerator, log_decay, weight, state, reset, valid
        return multiscale.turned(*given, chunk_size=3, implementation="plain")

    check(run, [numbers(2, T, 3, 2, 4), torch.full((1,), 1.5, dtype=torch.float64)], valid)


@pytest.mark.parametrize("rope", ["none", "before", "numerator"])
def test_of_a_mixer_by_tokens_or_compressed(rope: Literal["none", "before", "numerator"]) -> None:
    config = InfinityFormerConfig(d_model=8, n_layers=1, n_heads=2, d_ffn=8, vocab_size=5, feature_map="learned", rope=rope)
    mixer = Mixer(config).double()
    reset, valid = marks(T)
    turn = None if rope == "none" else rotary.Turn(*rotary.cos_sin(torch.arange(T)[None], 4, dtype=torch.float64), "plain")
    log_decay, weight = -numbers(2, T, 3, seed=2).abs(), numbers(2, T, 3, 1, 1, seed=1)
    state = torch.zeros(2, 3, 2, 4, 4, dtype=torch.float64), torch.zeros(2, 3, 2, 4, dtype=torch.float64)

    def run(qkv: Tensor, tau: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        vars(mixer)["tau"] = tau  # a leaf instead of the parameter
        return multiscale.recurrent(*mixer.mapped(qkv, turn, valid), log_decay, weight, state, reset, valid)

    check(run, [numbers(2, T, 3, 2, 4), torch.full((1,), 1.5, dtype=torch.float64)], valid)
