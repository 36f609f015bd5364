"""InfinityFormer: counts, forms, marks, derivatives, scales that stay apart, compression."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import checking
import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import InputError, count_params, init_params
from unisono_spec.contract.infinityformer import PRESETS, InfinityFormerConfig
from unisono_spec.models import create
from unisono_spec.ops import linear_attention, multiscale

SMALL = InfinityFormerConfig(d_model=8, n_layers=2, n_heads=2, d_ffn=10, vocab_size=11)
CONFIGS: dict[str, InfinityFormerConfig] = {
    "default": SMALL,
    "data-vector-numerator": SMALL.replace(decay="data", gate="vector", rope="numerator", tie_head=False, head_bias=True),
    "relu-none": SMALL.replace(feature_map="relu", rope="none", n_scales=1),
    "learned-vector": SMALL.replace(feature_map="learned", gate="vector", decay="data", n_scales=2),
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def inputs(rng: np.random.Generator, wide: bool, log_decay: float = -1.0) -> list[np.ndarray]:
    """B 2, T 6, M 3, H 2, K 3, V 4. v has a common mean; the numerator's q and k have signs, the normaliser's have none."""
    q, k = rng.normal(size=(2, 2, 6, 2, 3))
    q_norm, k_norm = np.abs(rng.normal(size=(2, 2, 6, 2, 3)))
    v = 3 + rng.normal(size=(2, 6, 2, 4))
    decays = log_decay * np.abs(rng.normal(size=(2, 6, 3))) * np.array([0, 1, 3])
    return [q, k, v, q_norm, k_norm, decays, rng.random((2, 6, 3, 2, 4) if wide else (2, 6, 3, 1, 1))]


def states(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(2, 3, 2, 3, 4)), np.abs(rng.normal(size=(2, 3, 2, 3)))


def test_counts() -> None:
    mixer = (768 * 3 * 768 + 3 * 768) + 3 + 3 + (768 + 1) + (768 * 768 + 768)  # qkv, a, c, gate, out
    layer = 4 * 768 + mixer + (768 * 2 * 3072 + 2 * 3072) + (3072 * 768 + 768)
    assert count_params(PRESETS["infinityformer-base"]) == 50257 * 768 + 12 * layer + 2 * 768 == 152_011_092
    assert abs(Fraction(count_params(PRESETS["infinityformer-1m"]), 1_060_212) - 1) < Fraction(1, 100)


def test_initial_decays() -> None:
    for n, expected in ((1, [0.99]), (2, [0.9, 0.999]), (3, [0.9, 0.99, 0.999])):
        p = init_params(SMALL.replace(n_scales=n), dtype="float64")
        checking.same(1 / (1 + np.exp(-p["layers.0.mixer.decay.bias"])), np.array(expected))
        assert len(set(p["layers.1.mixer.mix"])) == n
        assert p["layers.0.mixer.gate.bias"].tolist() == [-2]


def test_weight_decay() -> None:
    for name, p in CONFIGS["learned-vector"].params().items():
        assert p.weight_decay == (len(p.shape) > 1 and "embedding" not in name), name


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("log_decay", [-1.0, -1e-6, -300.0])
def test_op_forms(wide: bool, log_decay: float, rng: np.random.Generator) -> None:
    checking.op_forms(multiscale.recurrent, multiscale.parallel, inputs(rng, wide, log_decay), states(rng), rng)


def test_one_scale_without_decay_is_linear_attention(rng: np.random.Generator) -> None:
    q, k, v = (np.abs(a) for a in inputs(rng, False)[:3])
    S, z = (np.abs(a[:, :1]) for a in states(rng))
    o, final = multiscale.parallel(q, k, v, q, k, np.zeros((2, 6, 1)), np.ones((2, 6, 1, 1, 1)), (S, z))
    checking.same((o, (final[0][:, 0], final[1][:, 0])), linear_attention.recurrent(q, k, v, (S[:, 0], z[:, 0])))


def test_values_of_one(rng: np.random.Generator) -> None:
    """v ≡ 1 gives Σ_s c_s d_s / (d_s + ε) with d the denominators, and 0 where a ReLU map empties them."""
    _, _, v, q, k, log_decay, weight = inputs(rng, False)
    q[0, 2] = 0
    zero = np.zeros((2, 3, 2, 3, 4)), np.zeros((2, 3, 2, 3))
    L = np.cumsum(log_decay, 1)
    decay = np.tril(np.exp(np.moveaxis(L[:, :, None] - L[:, None], -1, 1)))  # [B, M, T, T]
    d = np.einsum("bmtj,bthk,bjhk->btmh", decay, q, k)
    expected = np.broadcast_to((weight[..., 0] * d / (d + multiscale.EPS)).sum(2)[..., None], v.shape)
    for form in (multiscale.recurrent, multiscale.parallel):
        checking.same(form(q, k, np.ones_like(v), q, k, log_decay, weight, zero)[0], expected)


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


@pytest.mark.parametrize("decay", ["learned", "data"])
def test_scales_have_gradients_of_their_own(decay: str, rng: np.random.Generator) -> None:
    """From initial values: a loss's derivative by each scale's decay and mixing weight is neither 0 nor another scale's."""
    config = PRESETS["infinityformer-1m"].replace(d_model=16, n_heads=2, d_ffn=16, n_layers=2, decay=decay)
    params, tokens = init_params(config, dtype="float64"), rng.integers(0, 256, (2, 24))
    direction = rng.normal(size=(2, 24, 256))
    for name in ("decay.bias", "mix"):
        slopes = []
        for s in range(config.n_scales):
            moved = dict(params)
            moved[f"layers.0.mixer.{name}"] = params[f"layers.0.mixer.{name}"] + 1e-30j * np.eye(config.n_scales)[s]
            logits, _ = create(config, moved).forward(tokens)
            slopes.append((np.imag(logits) / 1e-30 * direction).sum())
        size = max(map(abs, slopes))
        gaps = [abs(a - b) for i, a in enumerate(slopes) for b in slopes[:i]]
        assert min(*map(abs, slopes), *gaps) > numerics.mistake() * size > 0


def test_compression(rng: np.random.Generator) -> None:
    S = rng.normal(size=(2, 3, 5, 4))
    u, s, vt = np.linalg.svd(S, full_matrices=False)
    checking.same(multiscale.compressed(S, 2), (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :])
    config = SMALL.replace(compress_every=3, compress_rank=1)
    params = {n: p + 0.3 * rng.normal(size=p.shape) for n, p in init_params(config, dtype="float64").items()}
    model, tokens = create(config, params), rng.integers(0, 11, (2, 7))
    checking.model_forms(model, tokens, rng)
    checking.model_marks(model, tokens)
    for length in range(1, 7):
        ranks = np.linalg.matrix_rank(model.forward(tokens[:, :length])[1]["layers.1.S"])
        assert np.all(ranks == 1) == (length % 3 == 0 or length == 1), length  # the first token alone has rank 1
    # between the forms' direction and a finite difference stands only the projector's own derivative, which is cut
    direction = rng.normal(size=S.shape)
    P = u[..., :2] @ np.swapaxes(u[..., :2], -1, -2)
    checking.same(np.imag(multiscale.compressed(S + 1e-30j * direction, 2)) / 1e-30, P @ direction)


def test_relative_positions(rng: np.random.Generator) -> None:
    """Rotated in the numerator alone, scores depend on the tokens' distance; rotated before φ, on where both stand too."""
    tokens = rng.integers(0, 11, (2, 7))
    for rope in ("numerator", "before"):
        model = create(config := SMALL.replace(rope=rope), init_params(config, dtype="float64"))
        near, _ = model.forward(tokens)
        far, _ = model.forward(tokens, model.init_state(2) | {"position": np.full(2, 500, np.int32)})
        if rope == "numerator":
            checking.same(far, near)
        else:
            with pytest.raises(AssertionError):
                checking.same(far, near)


def test_resting_floats() -> None:
    dense, low = SMALL.replace(d_model=128, compress_every=8, compress_rank=31).resting_floats()
    assert (dense, low) == (64 * 64, 31 * 129)
    assert low < dense < SMALL.replace(d_model=128, compress_every=8, compress_rank=32).resting_floats()[1]


@pytest.mark.parametrize(
    "changes",
    [{"n_heads": 3}, {"compress_rank": 2}, {"compress_every": 2, "compress_rank": 5}, {"n_heads": 8}, {"rope": "after"}, {"n_scales": 0}],
)
def test_bad_config(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"infinityformer\.({'|'.join(changes)})"):
        SMALL.replace(**changes)
