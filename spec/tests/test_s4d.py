"""S4D: counts, forms, marks, derivatives, and its discretisation against complex arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import checking
import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError, count_params, init_params
from unisono_spec.contract.s4d import PRESETS, S4DConfig
from unisono_spec.models import create
from unisono_spec.ops import diagonal_ssm

SMALL = S4DConfig(d_model=4, n_layers=2, vocab_size=11, d_state=6, ffn_mult=2)
CONFIGS = {"default": SMALL, "no-ffn": SMALL.replace(ffn_mult=0, tie_head=True, head_bias=False)}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(23)


def dynamics(rng: np.random.Generator, dt: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Δ, A, C, D of three channels with four pairs."""
    A = np.stack([-np.abs(rng.normal(size=(3, 4))), np.pi * np.tile(np.arange(4.0), (3, 1))], -1)
    return dt * (1 + rng.random(3)), A, rng.normal(size=(3, 4, 2)), rng.normal(size=3)


def test_counts_and_initial_values() -> None:
    assert abs(Fraction(count_params(PRESETS["s4d-1m"]), 1_060_212) - 1) < Fraction(1, 100)
    p = init_params(PRESETS["s4d-1m"], dtype="float64")
    checking.same(np.exp(p["layers.0.mixer.log_A_real"]), np.full((136, 32), 0.5))
    checking.same(p["layers.0.mixer.A_imag"][7], np.pi * np.arange(32))
    dt = np.exp(p["layers.0.mixer.log_dt"])
    assert 1e-3 <= dt.min() < 2e-3 < 5e-2 < dt.max() <= 1e-1
    for name, q in SMALL.params().items():
        dynamic = name.rsplit(".", 1)[-1] in ("log_A_real", "A_imag")
        assert q.weight_decay == (len(q.shape) > 1 and not dynamic and "embedding" not in name), name


@pytest.mark.parametrize("dt", [0.0, 1e-4, 0.1, 30.0])
def test_op_forms(dt: float, rng: np.random.Generator) -> None:
    constants = dynamics(rng, dt)

    def form(function: Any) -> Any:
        return lambda u, state, *marks: function(u, *constants, state, *marks)

    state = rng.normal(size=(2, 3, 4, 2))
    checking.op_forms(form(diagonal_ssm.recurrent), form(diagonal_ssm.parallel), [3 + rng.normal(size=(2, 7, 3))], state, rng)


@pytest.mark.parametrize("dt", [1e-4, 0.1, 30.0, 1e5])
def test_against_complex_numbers(dt: float, rng: np.random.Generator) -> None:
    dt_, A, C, D = dynamics(rng, dt)
    u, state = rng.normal(size=(1, 5, 3)), rng.normal(size=(1, 3, 4, 2))
    a, c, h = (x[..., 0] + 1j * x[..., 1] for x in (A, C, state[0]))
    z, y = dt_[:, None] * a, []
    gain = dt_[:, None] * np.where(np.abs(z) < 0.1, sum(z**n / float(np.prod(np.arange(1.0, n + 2))) for n in range(12)), np.expm1(z) / z)
    for t in range(5):
        h = np.exp(z) * h + gain * u[0, t, :, None]
        y.append(2 * (c * h).sum(-1).real + D * u[0, t])
    final = np.stack([h.real, h.imag], -1)[None]
    for function in (diagonal_ssm.recurrent, diagonal_ssm.parallel):
        checking.same(function(u, dt_, A, C, D, state), (np.array(y)[None], final))


def test_small_steps_keep_their_digits(rng: np.random.Generator) -> None:
    """In float32, e^{ΔA} − 1 as printed would be wrong by 1e-3 of its size at Δ = 1e-4."""
    constants = dynamics(rng, 1e-4)
    u, state = rng.normal(size=(1, 1, 3)), np.zeros((1, 3, 4, 2))
    truth = diagonal_ssm.step(u[:, 0], *constants, state[:])[1]
    dt, A, C, D = (a.astype(np.float32) for a in constants)
    for function in (diagonal_ssm.recurrent, diagonal_ssm.parallel):
        final = function(u.astype(np.float32), dt, A, C, D, state.astype(np.float32))[1]
        assert final.dtype == np.float32
        judge.within(final, truth, numerics.rounding("float32", 2**5) * np.abs(truth).max())


@pytest.mark.parametrize("form", [diagonal_ssm.recurrent, diagonal_ssm.parallel])
def test_states_that_never_fade(form: Any, rng: np.random.Generator) -> None:
    """(e^{ΔA} − 1) / A is Δ at A = 0, as just beside it, and its slope is Δ²/2."""
    dt, A, C, D = dynamics(rng, 0.1)
    u, state = rng.normal(size=(1, 5, 3)), rng.normal(size=(1, 3, 4, 2))
    held = state[:, None] + np.stack([np.cumsum(dt * u, 1)[..., None].repeat(4, -1), np.zeros((1, 5, 3, 4))], -1)
    y = 2 * (C * [1, -1] * held).sum((-1, -2)) + D * u
    checking.same(form(u, dt, 0 * A, C, D, state), (y, held[:, -1]))
    checking.same(form(u, dt, A * 1e-170, C, D, state), (y, held[:, -1]))
    checking.complex_step(lambda a: form(u[:, :1], a[0], a[1], C, D, 0 * state)[1], [dt, 0 * A], rng)


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


@pytest.mark.parametrize("changes", [{"d_state": 5}, {"d_state": 0}, {"ffn_mult": -1}, {"dropout": 2.0}])
def test_bad_config(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"s4d\.({'|'.join(changes)})"):
        SMALL.replace(**changes)
