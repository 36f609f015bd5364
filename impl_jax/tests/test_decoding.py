"""Ids in a compiled loop: the contract's law, the host's texts, one trace for all."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unisono_spec
from unisono_jax import create, decoding
from unisono_jax.models import base
from unisono_spec.contract import InputError, init_params
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.sampling import GREEDY, Sampling, choose, uniform

WARM = Sampling(temperature=1.5, seed=7)
CUT = Sampling(0.7, top_k=9, top_p=0.8, seed=2**64 - 1)
MIXED = LATConfig(d_model=8, n_layers=2, vocab_size=30, head_width=4, qk_width=4, attention=("softmax", "linear"), ffn_mult=2)


def made(config: Any) -> tuple[Any, Any]:
    """The model, the spec's."""
    noise = np.random.default_rng(3)
    params = {name: p + np.float32(0.3) * noise.standard_normal(p.shape, np.float32) for name, p in init_params(config, seed=3).items()}
    return create(config, params), unisono_spec.create(config, params)


def text(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 30, (2, length))


@pytest.mark.parametrize("sampling", [GREEDY, WARM, CUT], ids=["greedy", "warm", "cut"])
def test_texts_are_those_of_the_spec(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, and going on; no prompt and no count is compiled anew, and no step by itself."""
    monkeypatch.setattr(decoding, "BLOCK", 8)
    model, truth = made(MIXED)
    run: Any = decoding._run
    step: Any = base._step
    last: Any = base._last
    before = run._cache_size(), step._cache_size(), last._cache_size()
    found = model.generate(text(5), 19, sampling, n_generated=3)
    assert np.array_equal(found.tokens, truth.generate(text(5), 19, sampling, n_generated=3).tokens)
    more = model.generate(found.tokens[:, -1:], 2, sampling, found.state, found.n_generated)
    assert np.array_equal(more.tokens, truth.generate(text(5), 21, sampling, n_generated=3).tokens[:, 19:])
    for length, count in ((6, 12), (7, 17), (13, 10)):
        assert np.array_equal(model.generate(text(length), count).tokens, truth.generate(text(length), count).tokens)
    assert run._cache_size() <= before[0] + 2  # this law, and greedy
    assert step._cache_size() <= before[1] + 1  # `more`, of fewer ids than a loop is worth
    assert last._cache_size() <= before[2] + 2  # prompts of 5 to 8 tokens, and of 9 to 16


def test_where_learned_positions_end_is_told() -> None:
    model, _ = made(MIXED.replace(positions="learned", max_positions=12))
    with pytest.raises(InputError, match="max_positions"):
        model.generate(text(5), 20)


def test_float64_is_not_rounded_in_silence() -> None:
    """A prompt of one token goes straight into the loop, which asks for JAX's 64-bit mode as any call does."""
    with jax.enable_x64(True):
        model = create(MIXED, dtype="float64")
        state = model.init_state(2, 32)
    with pytest.raises(InputError, match=r"jax\.enable_x64"):
        model.generate(text(1), 20, state=state)


def test_damaged_logits_are_named() -> None:
    model, _ = made(CRAMConfig(d_model=8, n_layers=1, vocab_size=30))
    state = model.init_state(2)
    model.head.weight[...] = jnp.full_like(model.head.weight[...], jnp.nan)
    compiled = model.compiled()
    with pytest.raises(InputError, match="NaN at generated token 5"):
        decoding.follow(compiled.graph, compiled.params, model.config, text(1)[:, 0], state, GREEDY, 5, 9)


@pytest.mark.parametrize("kind", ["plain", "ties", "infinite"])
def test_choices_are_those_of_the_contract(kind: str) -> None:
    z = 3 * np.random.default_rng(5).standard_normal((7, 3000))
    if kind == "ties":
        z[:, 100] = z[:, 2900] = z.max(-1)
    if kind == "infinite":
        z[:, 1::2] = -np.inf
        z[2, [4, 2500]], z[3, 6] = np.inf, np.inf
    logits = z.astype(np.float32)
    for law in (GREEDY, WARM, Sampling(0.5, top_k=40, seed=3), Sampling(2.0, top_p=0.6), Sampling(1.0, 5, 0.5, 11), Sampling(1e-3)):
        if law.temperature:
            found = decoding.sample(jnp.asarray(logits), jnp.asarray(uniform(law.seed, 7, 12, 1)[0]), *_scalars(law))
        else:
            found = decoding.greedy(jnp.asarray(logits))
        for a, b in zip(found, (*choose(logits, law, 12), np.zeros(7)), strict=True):
            assert np.array_equal(a, b)
    assert decoding.greedy(jnp.asarray([[0.0, np.nan], [-np.inf, -np.inf], [0.0, 1.0]]))[2].tolist() == [1, 2, 0]


def _scalars(law: Sampling) -> tuple[Any, Any, Any]:
    return jnp.float32(law.temperature), jnp.float32(law.top_p), jnp.int32(law.top_k)
