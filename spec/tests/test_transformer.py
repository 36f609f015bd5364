"""The Transformer baseline: counts, forms, marks, derivatives, its cache."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import checking
import numpy as np
import pytest
from unisono_spec.contract import InputError, count_params, init_params
from unisono_spec.contract.files import check_state
from unisono_spec.contract.lat import PRESETS as LAT
from unisono_spec.contract.transformer import PRESETS, TransformerConfig
from unisono_spec.models import create
from unisono_spec.ops.elementwise import softmax
from unisono_spec.ops.rotary import rotate

SMALL = TransformerConfig(d_model=8, n_layers=2, vocab_size=11, head_width=4, ffn_mult=2)
CONFIGS = {"default": SMALL, "tied": SMALL.replace(tie_head=True, head_bias=False)}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(19)


def test_counts() -> None:
    assert count_params(PRESETS["transformer-base"]) == count_params(LAT["lat-base"])  # the mixers differ, their matrices do not
    assert abs(Fraction(count_params(PRESETS["transformer-1m"]), 1_060_212) - 1) < Fraction(1, 100)


@pytest.mark.parametrize("name", CONFIGS)
def test_model(name: str, rng: np.random.Generator) -> None:
    config = CONFIGS[name]
    params = {n: p + 0.3 * rng.normal(size=p.shape) for n, p in init_params(config, dtype="float64").items()}
    model, tokens = create(config, params), rng.integers(0, 11, (2, 7))
    dropout = [rng.random((2, 7, config.d_model)) for _ in range(config.n_updates)]
    checking.model_forms(model, tokens, rng, dropout=dropout)
    checking.model_marks(model, tokens)
    checking.model_derivative(lambda p: create(config, p), params, tokens[:, :4], rng)
    narrow = create(config, params, dtype="float32").forward(tokens)
    assert narrow[0].dtype == np.float32
    assert {a.dtype.name for a in narrow[1].values()} == {"float32", "int32"}


def test_first_layer_is_causal_softmax(rng: np.random.Generator) -> None:
    """What the cache holds, and that logits move as softmax(q kᵀ / √K) v says: one layer, written out."""
    config = SMALL.replace(n_layers=1)
    p = {n: q + 0.3 * rng.normal(size=q.shape) for n, q in init_params(config, dtype="float64").items()}
    p["layers.0.ffn.down.weight"], p["layers.0.ffn.down.bias"] = p["layers.0.ffn.down.weight"] * 0, np.zeros(8)
    tokens = rng.integers(0, 11, (1, 6))

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = p["embedding.weight"][tokens[0]]
    y = layer_norm(x, "layers.0.mixer_norm") @ p["layers.0.mixer.qkv.weight"].T + p["layers.0.mixer.qkv.bias"]
    q, k, v = (a.reshape(6, 2, 4) for a in np.split(y, 3, 1))
    q, k = rotate(q, np.arange(6)), rotate(k, np.arange(6))
    scores = np.where(np.tri(6, dtype=bool), np.einsum("thk,jhk->htj", q, k) / 2, -np.inf)
    o = np.einsum("htj,jhv->thv", softmax(scores), v).reshape(6, 8)
    x = layer_norm(x + o @ p["layers.0.mixer.out.weight"].T + p["layers.0.mixer.out.bias"], "norm")
    logits, state = create(config, p).forward(tokens)
    checking.same((logits[0], state["layers.0.k"][0]), (x @ p["head.weight"].T + p["head.bias"], k))


def test_capacity() -> None:
    model, tokens = create(SMALL), np.zeros((2, 4), int)
    logits, state = model.forward(tokens, model.init_state(2, 5))
    assert state["layers.0.k"].shape == (2, 5, 2, 4)
    _, state = model.step(tokens[:, 0], state)
    with pytest.raises(InputError, match="capacity"):
        model.step(tokens[:, 0], state)
    state["layers.1.k"] = state["layers.1.k"][:, :4]
    with pytest.raises(InputError, match="state"):
        check_state(SMALL, state)
    assert np.array_equal(model.generate(tokens, 3).tokens[:, 0], logits[:, -1].argmax(-1))


@pytest.mark.parametrize("changes", [{"head_width": 3}, {"head_width": 1}, {"dropout": -0.1}, {"rope_base": 1.0}])
def test_bad_config(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"transformer\.({'|'.join(changes)})"):
        SMALL.replace(**changes)
