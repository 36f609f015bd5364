"""MARU: exact counts, forms, marks, derivatives, the learned initial memory, routing, erasing."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import checking
import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError, count_params, init_params
from unisono_spec.contract.base import Arrays
from unisono_spec.contract.maru import PRESETS, MARUConfig
from unisono_spec.models import create
from unisono_spec.ops import mom_gru

SMALL = MARUConfig(
    d_model=4, vocab_size=11, head_hidden=5, d_state=2, conv_width=3, dt_rank=2, n_banks=2, n_slots=3, d_memory=3, router_hidden=4
)
CONFIGS = {
    "default": SMALL,
    "gumbel": SMALL.replace(router="gumbel", erase="separate", temperature=0.5),
    "stack": SMALL.replace(n_layers=2, prenorm=True, erase="separate"),
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


def randomised(config: MARUConfig, rng: np.random.Generator) -> Arrays:
    return {n: p + 0.3 * rng.normal(size=p.shape) for n, p in init_params(config, dtype="float64").items()}


def cell(config: MARUConfig, rng: np.random.Generator) -> Arrays:
    prefix = "layers.0.cell."
    return {n.removeprefix(prefix): p for n, p in randomised(config, rng).items() if n.startswith(prefix)}


def test_counts() -> None:
    assert count_params(PRESETS["maru"]) == 6_315_941
    assert count_params(PRESETS["maru-wide"]) == 6_766_759
    assert count_params(PRESETS["maru"].replace(router="gumbel")) == 6_315_941  # buffers are not parameters
    assert abs(Fraction(count_params(PRESETS["maru-1m"]), 1_060_212) - 1) < Fraction(1, 100)
    assert sum(math.prod(s.shape) for s in PRESETS["maru"].states().values()) == 57_728


def test_initial_values() -> None:
    config = PRESETS["maru"]
    p, declared = init_params(config, dtype="float64"), config.params()
    memory = p["layers.0.cell.memory"]
    assert abs(memory.std() / 0.1 - 1) < numerics.sampling(2 * memory.size)
    for name, fans in (("router.0.weight", 32 + 1280), ("input.weight", 640 + 704), ("hidden.weight", 1280), ("gate.weight", 641)):
        bound = math.sqrt(6 / fans)
        assert 0.95 * bound < np.abs(p[f"layers.0.cell.{name}"]).max() <= bound, name
    assert {n for n, q in declared.items() if len(q.shape) > 1 and not q.weight_decay} == {
        "embedding.weight",
        "layers.0.mamba.A_log",
        "layers.0.cell.memory",
    }
    assert not any(q.weight_decay for q in declared.values() if len(q.shape) == 1)


def test_the_temperature_divides_logits_bias_and_noise(rng: np.random.Generator) -> None:
    """ρ = softmax((W₂ ReLU(W₁[x; h] + b₁) + b₂ + b + g) / τ), written out."""
    p = cell(SMALL.replace(router="gumbel"), rng)
    x, h, g = rng.normal(size=4), rng.normal(size=4), rng.gumbel(size=2)
    hidden = np.maximum(p["router.0.weight"] @ np.append(x, h) + p["router.0.bias"], 0)
    e = np.exp((p["router.1.weight"] @ hidden + p["router.1.bias"] + p["balance_bias"] + g) / 0.5)
    checking.same(mom_gru.routing(x[None], h[None], p, g[None], 0.5)[0], e / e.sum())


@pytest.mark.parametrize("erase", ["coupled", "separate"])
@pytest.mark.parametrize("noisy", [True, False])
def test_op_forms(erase: str, noisy: bool, rng: np.random.Generator) -> None:
    p = cell(SMALL.replace(erase=erase, router="gumbel"), rng)
    x, noise = rng.normal(size=(2, 6, 4)), rng.gumbel(size=(2, 6, 2))
    state = rng.normal(size=(2, 4)), rng.normal(size=(2, 2, 3, 3))

    def recurrent(x: Any, n: Any, state: Any, reset: Any = None, valid: Any = None) -> Any:
        return mom_gru.recurrent(x, p, state, reset, valid, n if noisy else None, 0.7)

    def hoisted(x: Any, n: Any, state: Any, reset: Any = None, valid: Any = None, chunk_size: int = 4) -> Any:
        return mom_gru.hoisted(x, p, state, reset, valid, chunk_size, n if noisy else None, 0.7)

    checking.op_forms(recurrent, hoisted, [x, noise], state, rng)


def test_cell_by_hand() -> None:
    """One bank, one slot, everything one wide: the five lines of the paper's cell, in plain floats."""
    w = {"router.0.weight": [[0.2, 0.1]], "router.0.bias": [0.1], "router.1.weight": [[0.4]], "router.1.bias": [0.0]}
    w |= {"query.weight": [[0.3, -0.2]], "query.bias": [0.1], "input.weight": [[0.5, 0.6], [-0.4, 0.3], [0.9, -0.7]]}
    w |= {"input.bias": [0.1, 0.2, -0.1], "hidden.weight": [[0.8], [0.7], [-0.6]], "key.weight": [[1.1]], "key.bias": [0.0]}
    w |= {"value.weight": [[-0.9]], "value.bias": [0.3], "gate.weight": [[0.4]], "gate.bias": [-0.2], "memory": [[[0.0]]]}
    x, h, M = 0.7, -0.3, 0.5

    def sigma(a: float) -> float:
        return 1 / (1 + math.exp(-a))

    r, z = sigma(0.5 * x + 0.6 * M + 0.1 + 0.8 * h), sigma(-0.4 * x + 0.3 * M + 0.2 + 0.7 * h)
    new = z * h + (1 - z) * math.tanh(0.9 * x - 0.7 * M - 0.1 - 0.6 * (r * h))
    v, gamma = -0.9 * new + 0.3, sigma(0.4 * new - 0.2)
    memory = M * (1 - gamma * sigma(v)) + gamma * math.tanh(v)
    p = {name: np.array(a) for name, a in w.items()}
    o, (_, m) = mom_gru.step(np.array([[x]]), p, (np.array([[h]]), np.array([[[[M]]]])))
    checking.same([o, m], [np.array([[new]]), np.array([[[[memory]]]])])


@pytest.mark.parametrize("name", CONFIGS)
def test_model(name: str, rng: np.random.Generator) -> None:
    config = CONFIGS[name]
    params = randomised(config, rng)
    model, tokens = create(config, params), rng.integers(0, 11, (2, 6))
    extra = {"dropout": [rng.random((2, 6, 4)) for _ in range(config.n_updates)]}
    if name == "gumbel":
        extra["noise"] = [rng.gumbel(size=(2, 6, 2))]
    checking.model_forms(model, tokens, rng, **extra)
    checking.model_marks(model, tokens)
    checking.model_derivative(lambda p: create(config, p), params, tokens[:, :4], rng)
    narrow = create(config, params, dtype="float32").forward(tokens)
    assert {narrow[0].dtype.name, *(a.dtype.name for a in narrow[1].values())} == {"float32"}


def test_memory_starts_as_the_parameter(rng: np.random.Generator) -> None:
    """init_state copies M₀ for every row, and both it and a reset pass gradients on to M₀."""
    model = create(SMALL, randomised(SMALL, rng))
    name, tokens = "layers.0.cell.memory", rng.integers(0, 11, (2, 3))
    assert np.array_equal(model.init_state(2)["layers.0.memory"], np.stack([model.params[name]] * 2))
    foreign = {n: a if n != "layers.0.memory" else rng.normal(size=a.shape) for n, a in model.init_state(2).items()}
    moved = create(SMALL, {**model.params, name: model.params[name] + 1e-30j})
    reset = np.array([[True, False, False], [False, False, False]])
    for form in ("recurrent", "parallel"):
        slope = np.imag(moved.forward(tokens, foreign, reset, form=form)[0])
        assert np.abs(slope[0]).max() > 0 == np.abs(slope[1]).max()
        assert (np.abs(np.imag(moved.forward(tokens, form=form)[0])).max((1, 2)) > 0).all()


def test_gumbel_acts_in_training_only(rng: np.random.Generator) -> None:
    config = CONFIGS["gumbel"]
    params, tokens = randomised(config, rng), rng.integers(0, 11, (1, 5))
    dense = create(config.replace(router="dense"), {n: p for n, p in params.items() if ".balance_" not in n})
    checking.same(create(config, params).forward(tokens), dense.forward(tokens), 0)
    noise = [np.zeros((1, 5, 2))]
    assert judge.differ(create(config, params).forward(tokens, noise=noise)[0], dense.forward(tokens)[0])
    with pytest.raises(InputError, match="noise"):
        dense.forward(tokens, noise=noise)


def test_balancing_evens_out_the_load() -> None:
    """Against a router that prefers bank 0 by 1.5, the bias ends where both banks are read alike."""
    bias, average = np.zeros(2), np.full(2, 0.5)
    for _ in range(8000):
        load = np.exp(np.array([1.5, 0.0]) + bias)
        bias, average = mom_gru.balanced(bias, average, load / load.sum(), rate=0.01)
    checking.same(bias[1] - bias[0], np.array(1.5))
    once = mom_gru.balanced(np.zeros(2), np.full(2, 0.5), np.array([1.0, 0.0]))
    checking.same(list(once), [np.array([-0.0005, 0.0005]), np.array([0.55, 0.45])])


@pytest.mark.parametrize("changes", [{"n_layers": 2}, {"temperature": 0.0}, {"n_banks": 0}, {"erase": "both"}, {"balance_rate": -1.0}])
def test_bad_config(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"maru\.({'|'.join(changes)})"):
        SMALL.replace(**changes)
