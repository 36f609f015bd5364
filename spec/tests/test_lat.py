"""LAT and Based: counts, forms, marks, derivatives, and the laws of their mixers."""

from __future__ import annotations

import importlib
from fractions import Fraction
from typing import Any

import checking
import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError, count_params, init_params
from unisono_spec.contract.files import load_state, save_state
from unisono_spec.contract.lat import PRESETS, LATConfig
from unisono_spec.models import create, load
from unisono_spec.ops import features, linear_attention, short_conv, softmax_attention, window
from unisono_spec.ops.elementwise import erfc, gelu, rms_norm, softmax, softplus
from unisono_spec.ops.rotary import angles, rotate

SMALL = LATConfig(d_model=12, n_layers=2, vocab_size=11, head_width=6, qk_width=4, ffn_mult=2, window=4)
CONFIGS: dict[str, LATConfig] = {
    "elu1": SMALL,
    "relu-rope": SMALL.replace(feature_map="relu", positions="rope"),
    "learned-map-learned-positions": SMALL.replace(feature_map="learned", positions="learned", max_positions=9),
    "hybrid": SMALL.replace(n_layers=4, attention=["softmax", "linear", "window", "conv"], positions="rope", norm="rms"),
    "based": PRESETS["based-1m"].replace(
        d_model=12, n_layers=3, attention=("conv", "linear", "window"), head_width=6, qk_width=2, window=3
    ),
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def heads(rng: np.random.Generator, batch: int = 2, length: int = 7, n: int = 2, k: int = 3, v: int = 5) -> list[np.ndarray]:
    """q, k [B, T, H, K], v [B, T, H, V] with K ≠ V; q and k positive, as feature maps are; v with a common mean."""
    q, key = (np.abs(rng.normal(size=(batch, length, n, k))) for _ in range(2))
    return [q, key, 3 + rng.normal(size=(batch, length, n, v))]


def randomised(config: LATConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Parameters away from their initial zeros and ones, large enough that every part matters."""
    return {name: p + 0.3 * rng.normal(size=p.shape) for name, p in init_params(config, dtype="float64").items()}


def test_counts() -> None:
    exact = {"lat-base": 70_428_753, "lat-bytes": 19_177_728, "based": 362_526_720}
    assert {name: count_params(PRESETS[name]) for name in exact} == exact
    for name in ("lat-1m", "based-1m", "linear-transformer-1m"):
        assert abs(Fraction(count_params(PRESETS[name]), 1_060_212) - 1) < Fraction(1, 100)
    assert PRESETS["based"].kinds.count("linear") == PRESETS["based"].kinds.count("window") == 5
    assert [i for i, kind in enumerate(PRESETS["based"].kinds) if kind == "linear"] == [1, 6, 11, 16, 21]


def test_weight_decay() -> None:
    config = CONFIGS["hybrid"].replace(feature_map="learned")
    for name, p in config.params().items():
        assert p.weight_decay == (len(p.shape) > 1 and "embedding" not in name), name


@pytest.mark.parametrize("shared", ["quadratic", "window", "softmax", "linear"])
def test_op_forms(shared: str, rng: np.random.Generator) -> None:
    inputs = heads(rng)
    batch, _, n, k = inputs[0].shape
    v = inputs[2].shape[-1]
    if shared in ("linear", "quadratic"):
        state = np.abs(rng.normal(size=(batch, n, k, v))), np.abs(rng.normal(size=(batch, n, k)))

        def quadratic(*a: Any) -> Any:
            return linear_attention.quadratic(*a[:6])

        checking.op_forms(linear_attention.recurrent, linear_attention.parallel if shared == "linear" else quadratic, inputs, state, rng)
        return
    op, size = (window, 3) if shared == "window" else (softmax_attention, 20)
    empty = np.zeros((batch, size, n, k)), np.zeros((batch, size, n, v)), np.zeros(batch, np.int32)
    _, state = op.recurrent(*heads(rng, batch, 2, n, k, v), empty, valid=np.array([[True, False], [True, True]]))
    checking.op_forms(op.recurrent, op.parallel, inputs, state, rng)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_conv_forms(bias: bool, width: int, rng: np.random.Generator) -> None:
    weight, b = rng.normal(size=(3, 1, width)), rng.normal(size=3) if bias else None

    def form(function: Any) -> Any:
        return lambda x, state, reset=None, valid=None, *chunk: function(x, weight, b, state, reset, valid, *chunk)

    x, state = rng.normal(size=(2, 6, 3)), rng.normal(size=(2, width - 1, 3))
    if width > 1:  # without a window there is nothing that a reset could change
        checking.op_forms(form(short_conv.recurrent), form(short_conv.parallel), [x], state, rng)
    full = np.stack([np.convolve(np.r_[state[0, :, 0], x[0, :, 0]], weight[0, 0, ::-1])[width - 1 :][:6]])
    checking.same(short_conv.parallel(x, weight, b, state)[0][:1, :, 0] - (0 if b is None else b[0]), full)


def test_values_of_one(rng: np.random.Generator) -> None:
    """v ≡ 1 gives d / (d + ε), d the denominator: 1 but for ε, and 0 where a ReLU map empties it. A window gives 1."""
    q, k, v = heads(rng)
    q[0, 3], one = 0, np.ones_like(v)
    zero = np.zeros((2, 2, 3, 5)), np.zeros((2, 2, 3))
    d = np.einsum("bthk,bthk->bth", q, np.cumsum(k, 1))[..., None]
    expected = np.broadcast_to(d / (d + linear_attention.EPS), one.shape)
    for form in (linear_attention.recurrent, linear_attention.parallel, linear_attention.quadratic):
        checking.same(form(q, k, one, zero)[0], expected)
    empty = np.zeros((2, 3, 2, 3)), np.zeros((2, 3, 2, 5)), np.zeros(2, np.int32)
    for op in (window.recurrent, window.parallel):
        checking.same(op(q, k, one, empty)[0], one)


def test_window_is_softmax_over_a_band(rng: np.random.Generator) -> None:
    q, k, v = heads(rng, length=9)
    scores = np.einsum("bthk,bjhk->bhtj", q, k) / 3**0.5
    back = np.subtract.outer(np.arange(9), np.arange(9))
    weight = softmax(np.where((back >= 0) & (back < 4), scores, -np.inf))
    empty = np.zeros((2, 4, 2, 3)), np.zeros((2, 4, 2, 5)), np.zeros(2, np.int32)
    o, (keys, values, count) = window.recurrent(q, k, v, empty)
    checking.same(o, np.einsum("bhtj,bjhv->bthv", weight, v))
    assert np.array_equal(keys, k[:, -4:])
    assert np.array_equal(values, v[:, -4:])
    assert count.tolist() == [9, 9]


def test_capacity(rng: np.random.Generator) -> None:
    model = create(SMALL.replace(attention="softmax"))
    tokens = np.zeros((1, 5), int)
    for form in ("recurrent", "parallel"):
        with pytest.raises(InputError, match="capacity"):
            model.forward(tokens, model.init_state(1, 4), form=form)
        reset = np.array([[False, False, True, False, False]])
        model.forward(tokens, model.init_state(1, 3), reset, form=form)
    with pytest.raises(InputError, match="capacity"):
        model.init_state(1)
    assert model.generate(tokens, 3).tokens.shape == (1, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_model(name: str, rng: np.random.Generator) -> None:
    config = CONFIGS[name]
    params = randomised(config, rng)
    model = create(config, params)
    tokens = rng.integers(0, config.vocab_size, (2, 7))
    dropout = [rng.random((2, 7, config.d_model)) for _ in range(config.n_updates)]
    checking.model_forms(model, tokens, rng, dropout=dropout)
    checking.model_marks(model, tokens)
    checking.model_derivative(lambda p: create(config, p), params, tokens[:, :4], rng)
    narrow = create(config, params, dtype="float32").forward(tokens)
    assert narrow[0].dtype == np.float32
    assert {a.dtype.name for a in narrow[1].values()} == {"float32", "int32"}


def test_taylor2(rng: np.random.Generator) -> None:
    q, k = rng.normal(size=(2, 5, 6))
    s = (q * k).sum(-1) / 6**0.5
    checking.same((features.taylor2(q) * features.taylor2(k)).sum(-1), 1 + s + s * s / 2)


def test_elu1_keeps_what_elu_plus_one_loses() -> None:
    x = np.array([-20, -1, 0, 2], np.float32)
    assert features.elu1(x).dtype == np.float32
    assert np.array_equal(features.elu1(x), np.array([np.exp(np.float32(-20)), np.exp(np.float32(-1)), 1, 3], np.float32))
    assert (np.expm1(x[0]) + np.float32(1)) == 0 < features.elu1(x)[0]


@pytest.mark.parametrize("position", [0, 1, 1023, 1024, 200_000, 10**6, 2**31 - 1])
def test_rope_far_out(position: int) -> None:
    """Against exact rational multiples of the frequencies, reduced by a π of 40 digits."""
    turn = 2 * Fraction(31415926535897932384626433832795028841971, 10**40)
    for i, angle in enumerate(angles(np.array(position, np.int32), 8)):
        exact = position * Fraction(10000.0 ** (-2 * i / 8)) % turn
        gap = abs(Fraction(float(angle)) - exact)
        # 2π itself is known to u in float64, and each of four digits is worth at most position / 2π turns
        assert min(gap, turn - gap) <= 2 * numerics.rounding("float64", position + 2**4)


def test_rope_turns_pairs(rng: np.random.Generator) -> None:
    q, k = rng.normal(size=(2, 1, 6))

    def score(a: int, b: int) -> np.ndarray:
        return (rotate(q, np.array(a)) * rotate(k, np.array(b))).sum(-1)

    checking.same(score(5, 2), score(1005, 1002))
    assert judge.differ(score(5, 2), score(5, 3))
    one = rotate(np.array([[1.0, 0, 0, 0]]), np.array(1))
    checking.same(one, np.array([[np.cos(1), 0, np.sin(1), 0]]))


@pytest.mark.parametrize("function", [erfc, gelu, softplus, softmax, features.elu1, features.relu, features.taylor2])
def test_elementwise_derivatives(function: Any, rng: np.random.Generator) -> None:
    checking.complex_step(lambda a: function(a[0]), [rng.normal(size=(4, 5)) * 3], rng)
    assert np.isfinite(function(np.array([[-700.0, 30, 700]]))).all()


def test_rms_norm(rng: np.random.Generator) -> None:
    x, weight = rng.normal(size=(3, 8)), rng.normal(size=8)
    checking.same(rms_norm(x, weight), weight * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6))
    checking.complex_step(lambda a: rms_norm(*a), [x, weight], rng)


def test_files(tmp_path: Any) -> None:
    from unisono_spec.contract.files import save_params

    config = CONFIGS["hybrid"]
    model = create(config, seed=3)
    save_params(tmp_path / "model.safetensors", config, init_params(config, 3))
    assert load(tmp_path / "model.safetensors").config == config
    _, state = model.forward(np.arange(5)[None])
    save_state(tmp_path / "state.safetensors", config, state)
    checking.same(load_state(tmp_path / "state.safetensors")[1], state)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "lienar"},
        {"attention": ["linear"]},
        {"head_width": 7},
        {"feature_map": "taylor2", "qk_width": 17},
        {"positions": "rope", "qk_width": 3},
        {"dropout": 1.0},
        {"attention": 3},
        {"rope_base": 0.0, "positions": "rope"},
        {"rope_base": -1.0},
    ],
)
def test_bad_config(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"lat\.({'|'.join(changes)})"):
        SMALL.replace(**changes)


def test_learned_positions_end() -> None:
    model = create(CONFIGS["learned-map-learned-positions"])
    tokens = np.zeros((1, 10), int)
    for form in ("recurrent", "parallel"):
        with pytest.raises(InputError, match="max_positions"):
            model.forward(tokens, form=form)
        model.forward(tokens, valid=np.arange(10)[None] < 9, form=form)


def test_importable_by_name() -> None:
    assert importlib.import_module("unisono_spec.models.lat").MODEL.__name__ == "LAT"
