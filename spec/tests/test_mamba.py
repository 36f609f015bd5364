"""Mamba: the published count, forms, marks, derivatives, initial values."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import checking
import numpy as np
import pytest
from unisono_spec.contract import InputError, count_params, init_params
from unisono_spec.contract.mamba import PRESETS, MambaConfig
from unisono_spec.models import create
from unisono_spec.ops import selective_scan

SMALL = MambaConfig(d_model=4, n_layers=2, vocab_size=11, d_state=3)
CONFIGS = {"default": SMALL, "biased": SMALL.replace(bias=True, conv_bias=False, conv_width=2, tie_head=False, head_bias=True, dt_rank=2)}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(13)


def test_counts() -> None:
    assert count_params(PRESETS["mamba-130m"]) == 129_135_360  # as the checkpoint of that name
    assert abs(Fraction(count_params(PRESETS["mamba-1m"]), 1_060_212) - 1) < Fraction(1, 100)


def test_initial_values() -> None:
    p = init_params(PRESETS["mamba-1m"], dtype="float64")
    checking.same(np.exp(p["layers.0.mixer.A_log"]), np.tile(np.arange(1.0, 17), (288, 1)))
    dt = np.log1p(np.exp(p["layers.3.mixer.dt_proj.bias"]))
    assert 1e-3 <= dt.min() < 2e-3 < 5e-2 < dt.max() <= 1e-1
    assert 0.3 < np.abs(p["layers.3.mixer.dt_proj.weight"]).max() <= 9**-0.5
    decayed = {n.split(".", 3)[-1] for n, q in SMALL.params().items() if q.weight_decay}
    assert decayed == {"in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}


@pytest.mark.parametrize("speed", [1e-4, 1.0, 300.0])
def test_op_forms(speed: float, rng: np.random.Generator) -> None:
    """From states that hardly decay to states that are gone in a token."""
    A, D = -speed * np.abs(rng.normal(size=(3, 4))), rng.normal(size=3)

    def form(function: Any) -> Any:
        return lambda u, dt, B, C, state, *marks: function(u, dt, A, B, C, D, state, *marks)

    u, dt, B, C = (2 + rng.normal(size=(2, 7, n)) for n in (3, 3, 4, 4))
    inputs, state = [u, np.abs(dt), B, C], rng.normal(size=(2, 3, 4))
    checking.op_forms(form(selective_scan.recurrent), form(selective_scan.parallel), inputs, state, rng)


def test_scan_against_its_sum(rng: np.random.Generator) -> None:
    """One channel, one state: y_t = C_t Σ_j Π_{j<i≤t} exp(Δ_i A) Δ_j B_j u_j + D u_t, written out."""
    u, B, C = rng.normal(size=(3, 1, 5, 1))
    dt, A, D = np.abs(rng.normal(size=(1, 5, 1))), np.array([[-0.7]]), np.array([1.3])
    y = [sum(np.exp(-0.7 * dt[0, j + 1 : t + 1].sum()) * (dt * B * u)[0, j, 0] for j in range(t + 1)) for t in range(5)]
    expected = C[0, :, 0] * np.array(y) + 1.3 * u[0, :, 0]
    checking.same(selective_scan.recurrent(u, dt, A, B, C, D, np.zeros((1, 1, 1)))[0][0, :, 0], expected)


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
    assert {narrow[0].dtype.name, *(a.dtype.name for a in narrow[1].values())} == {"float32"}


@pytest.mark.parametrize(
    "changes", [{"d_state": 0}, {"dt_rank": -1}, {"dropout": 1.0}, {"conv_width": 0}, {"norm_eps": 0.0}, {"norm_eps": 2.0}]
)
def test_bad_config(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"mamba\.({'|'.join(changes)})"):
        SMALL.replace(**changes)
