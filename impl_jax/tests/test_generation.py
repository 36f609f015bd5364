"""Continuing prompts: in one call or many, ragged or not, in pieces."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import unisono_spec
from flax import nnx
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_jax import create, state_from_numpy
from unisono_jax.models import base
from unisono_spec.contract import InputError, generation
from unisono_spec.contract.sampling import GREEDY, Sampling

CASES = [(cases()[name], variant) for name, variant in (("cram", "adaptive"), ("transformer", "plain"), ("maru", "plain"))]
EACH = pytest.mark.parametrize(("case", "variant"), CASES, ids=[f"{case.name}-{variant}" for case, variant in CASES])
WARM = Sampling(temperature=1.5, seed=7)
LENGTH = 9


def made(case: ModelCase, variant: str) -> tuple[Any, Any, np.ndarray]:
    """The model, the spec's, a prompt."""
    draw = Draw(case=case.name, variant=variant, regime=case.regimes[0], length=LENGTH)
    inputs = case.inputs(draw, "float32")
    config = case.setting(draw)
    return create(config, inputs.params), unisono_spec.create(config, inputs.params), inputs.arrays["tokens"]


@EACH
def test_calls_of_one_token_are_one_call_of_many(case: ModelCase, variant: str) -> None:
    """And draw what the spec draws."""
    model, truth, prompt = made(case, variant)
    whole = model.generate(prompt, 7, WARM)
    found, tokens = model.generate(prompt, 1, WARM), []
    tokens.append(found.tokens)
    for n in (1, 1, 1, 3):
        found = model.generate(found.tokens[:, -1:], n, WARM, found.state, found.n_generated)
        tokens.append(found.tokens)
    assert np.array_equal(np.concatenate(tokens, 1), whole.tokens)
    assert found.n_generated == 7
    one = model.compiled().step(prompt[:, 0], found.state)[1]  # ... and of one token, as the contract orders the state
    assert list(whole.state) == list(one) == list(model(prompt)[1]) == list(model.config.states())
    assert np.array_equal(whole.tokens, truth.generate(prompt, 7, WARM).tokens)
    assert np.array_equal(model.generate(prompt, 1, WARM, n_generated=6).tokens, truth.generate(prompt, 1, WARM, n_generated=6).tokens)


@EACH
def test_ragged_prompts(case: ModelCase, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded left, right and between, in pieces: as the spec reads each row alone."""
    model, truth, prompt = made(case, variant)
    valid = np.ones((3, LENGTH), bool)
    valid[0, :5], valid[1, 4:], valid[2, 2:5] = False, False, False
    rows = np.concatenate([prompt, prompt[:1, ::-1]])
    alone = [truth.generate(row[None, read], 4).tokens[0] for row, read in zip(rows, valid, strict=True)]
    monkeypatch.setattr(generation, "PIECE", 5)
    assert np.array_equal(model.generate(rows, 4, valid=valid).tokens, alone)


def test_generating_in_traced_code_is_refused() -> None:
    """Whatever of it is traced: the prompt, the state, the model, or what is computed alone."""
    case, variant = CASES[0]
    assert isinstance(case, ModelCase)
    model, _, prompt = made(case, variant)
    state = model.init_state(len(prompt))
    for run in (
        jax.jit(lambda prompt: model.generate(prompt, 2).tokens),
        jax.vmap(lambda row: model.generate(row[None], 2).tokens),
        lambda prompt: jax.jit(lambda state: model.generate(prompt, 2, state=state).tokens)(state),
        lambda prompt: nnx.jit(lambda model: model.generate(prompt, 2).tokens)(model),
        lambda prompt: jax.jit(lambda: model.generate(prompt, 2).tokens)(),
    ):
        with pytest.raises(InputError, match=r"prompt: .* is traced"):
            run(prompt)


def test_masked_arrays_are_refused() -> None:
    """Also where they become others, which have no mask."""
    case, variant = CASES[0]
    assert isinstance(case, ModelCase)
    model, _, prompt = made(case, variant)
    for given in ({"prompt": np.ma.masked_array(prompt)}, {"prompt": prompt, "valid": np.ma.masked_array(prompt >= 0)}):
        with pytest.raises(InputError, match="MaskedArray, which computes by rules of its own"):
            model.generate(max_new_tokens=1, **given)
    with pytest.raises(InputError, match="state: xi: a MaskedArray"):
        state_from_numpy({"xi": np.ma.masked_array(prompt)})


def test_few_lengths_are_compiled() -> None:
    case = cases()["transformer"]
    model, _, _ = made(case, case.defaults[0])  # pyright: ignore[reportArgumentType]
    last: Any = base._last
    step: Any = base._step
    before = last._cache_size(), step._cache_size()
    for length in (17, 18, 25, 31, 32):
        found = model.generate(np.zeros((1, length), int), 2)
        model.generate(found.tokens[:, -1:], 2, GREEDY, found.state, found.n_generated)
    assert (last._cache_size(), step._cache_size()) == (before[0] + 2, before[1] + 2)  # caches of 32 and of 64
