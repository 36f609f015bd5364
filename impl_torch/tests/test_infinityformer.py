"""InfinityFormer: forms, gradients, marks, dtypes, decays hard and soft, compression."""

from __future__ import annotations

import pytest
import torch
from unisono_conformance import judge, numerics
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_torch.ops import multiscale
from unisono_torch.ops.features import elu1

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
)

SMALL = InfinityFormerConfig(d_model=8, n_layers=1, n_heads=2, d_ffn=6, vocab_size=11)
VARIANTS = {
    "learned": SMALL,
    "data": SMALL.replace(decay="data", feature_map="learned", n_layers=2),
    "vector": SMALL.replace(gate="vector", rope="numerator", tie_head=False, head_bias=True),
    "one scale": SMALL.replace(n_scales=1, feature_map="relu", rope="none"),
    "compressed": SMALL.replace(compress_every=4, compress_rank=2),
}
ALL = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
SCALES = 3


@ALL
@pytest.mark.parametrize("marked", [False, True])
def test_forms_and_steps_agree_across_a_handed_over_state(config: InfinityFormerConfig, marked: bool) -> None:
    check_forms(config, marked)


@ALL
def test_gradients_are_the_same_in_both_forms(config: InfinityFormerConfig) -> None:
    check_gradients(config)


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(config: InfinityFormerConfig, dtype: str) -> None:
    check_dtypes(config, dtype)


def case(length: int, one_decay: bool = False, vector: bool = False):
    """Both forms of the op with marks, and float inputs."""
    reset, valid = marks(length)
    q, k, q_norm, k_norm = elu1(numbers(4, 2, length, 2, 2, seed=length))
    v, weight = numbers(2, length, 2, 3), numbers(2, length, SCALES, 2 if vector else 1, 3 if vector else 1, seed=1)
    log_decay = -numbers(1, 1, SCALES).abs() if one_decay else -numbers(2, length, SCALES, seed=2).abs()
    S, z = numbers(2, SCALES, 2, 2, 3, seed=3), numbers(2, SCALES, 2, 2, seed=4).abs()

    def run(form: str, q, k, v, q_norm, k_norm, weight, log_decay, S, z, **how):
        given = q, k, v, q_norm, k_norm, log_decay, weight, (S, z), reset, valid
        return getattr(multiscale, form)(*given, **how)

    return run, [q, k, v, q_norm, k_norm, weight, log_decay, S, z], valid


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("one_decay", [False, True])
def test_gradcheck(one_decay: bool, vector: bool) -> None:
    run, given, _ = case(6, one_decay, vector)
    check_derivatives(run, given, chunk_size=2)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("one_decay", [False, True])
def test_what_is_not_valid_reaches_neither_outputs_nor_gradients(form: str, one_decay: bool) -> None:
    run, given, valid = case(30, one_decay)
    check_poison(run, form, given, 6 if one_decay else 7, valid, **({"chunk_size": 4} if form == "parallel" else {}))
    assert not run(form, *given)[0][~valid].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_decays_keep_their_digits_beside_hard_ones(dtype: torch.dtype) -> None:
    run, given, _ = case(200)
    *given, log_decay, S, z = given
    hard = torch.rand(log_decay.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    log_decay = torch.where(hard, -1000.0, -1e-3 * log_decay.abs())
    given = [a.to(dtype) for a in (*given, log_decay, S, z)]
    truth, end = run("recurrent", *(a.double() for a in given))
    found, state = run("parallel", *given, chunk_size=64)
    # q, k, their norms and S are positive: with the weights and values so too, all terms have one sign
    terms = run("recurrent", *(a.double().abs() if i != 6 else a.double() for i, a in enumerate(given)))
    budget = numerics.formula(str(dtype).removeprefix("torch."), 200)
    judge.within(found, truth, budget * terms[0])
    for a, b, size in zip(state, end, terms[1], strict=True):
        judge.within(a, b, budget * size)


def test_a_chain_of_many_chunks_carries_its_state() -> None:
    # chunks of 1 fill more than one group of the upper level
    run, given, _ = case(150)
    judge.same(run("parallel", *given, chunk_size=1), run("recurrent", *given))


def test_every_scale_has_a_gradient_of_its_own() -> None:
    model = create(SMALL)
    found = gradients(model, midway(model), "parallel")["layers.0.mixer.decay.bias"]
    assert found.all()
    assert len(found.unique()) == SMALL.n_scales


def test_compression_is_the_best_of_its_rank() -> None:
    S = numbers(3, 5, 4)
    found = multiscale.compressed(S, 2)
    assert (torch.linalg.matrix_rank(found) == 2).all()
    # Eckart and Young: what is lost are the other singular values
    lost = torch.linalg.svdvals(S)[..., 2:].square().sum(-1)
    judge.same((S - found).square().sum((-1, -2)), lost)


def test_saved_memory_is_linear_in_length() -> None:
    config = SMALL.replace(decay="data")
    assert saved_bytes(config, 4096) < 5 * saved_bytes(config, 1024)  # 16 times, were there a T×T tensor
