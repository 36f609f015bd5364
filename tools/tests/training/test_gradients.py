"""The first loss and gradient of each backend, against the float64 spec and its complex step, within the court's error budget."""

from __future__ import annotations

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import Arrays, Config, init_params
from unisono_spec.models import create
from unisono_tools.backends import open_trainer
from unisono_tools.backends.base import Batch
from unisono_tools.evaluation import nll
from unisono_tools.train.loader import starting_state

MODELS = {
    "fixed": ("cram-demo", {}),
    "embedding": ("cram-demo", {"codes": "embedding", "tie_head": True}),
    "adaptive": ("cram-1m", {"position_offset": "random", "position_bits": 6}),
}
LENGTH, ROWS = 9, 2


def _nats(config: Config, params: Arrays, batch: Batch, dtype: str, seed: int | None = None) -> np.ndarray:
    """Nats of each token by the spec; complex parameters give complex ones."""
    model = create(config, params, dtype=dtype)
    if seed is not None:
        model.rounded = numerics.perturbation(dtype, seed)
    logits, _ = model.forward(batch.inputs, batch.state, form="recurrent")
    logits = logits - np.real(logits).max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def _slope(
    config: Config, params: Arrays, name: str, direction: np.ndarray, batch: Batch, dtype: str, seed: int | None = None
) -> np.ndarray:
    """The derivative of each token's nats along one parameter's `direction`, by the complex step."""
    kind = {"float64": np.complex128, "float32": np.complex64}[dtype]
    nudged = {**params, name: (params[name] + 1j * numerics.STEP * direction).astype(kind)}
    return np.imag(_nats(config, nudged, batch, dtype, seed)) / numerics.STEP


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_first_loss_and_gradient(backend, model, dtype, tiny):
    preset, overrides = MODELS[model]
    train = tiny(preset, {"n_layers": 1, "vocab_size": 16, **overrides}, backend=backend, dtype=dtype, batch_size=ROWS)
    config = train.validate()
    params = init_params(config, 1, "float32")
    rows = np.random.default_rng(0).integers(0, 16, (ROWS, LENGTH + 1))
    batch = Batch(rows[:, :-1], rows[:, 1:], state=starting_state(train, config, 0))
    trainer = open_trainer(train, config)
    trainer.init(params)
    result, gradient = trainer.gradient(batch, 0)

    near = numerics.estimate_dtype(dtype)
    wide = {name: p.astype(np.float64) for name, p in params.items()}
    seeds = range(numerics.REALISATIONS)
    truth = np.array([_nats(config, wide, batch, "float64").mean()])
    errors = np.array([[_nats(config, params, batch, near, seed).mean()] for seed in seeds]) - truth
    budget = numerics.row_budget(truth, errors, dtype, LENGTH * ROWS)
    numerics.check_useful(budget, np.abs(truth), "loss")
    assert numerics.share(np.array([result.loss]), truth, budget).max() <= 1

    for name, p in params.items():
        direction = np.random.default_rng(len(name)).choice([-1.0, 1.0], p.shape)
        each = _slope(config, wide, name, direction, batch, "float64")
        errors = np.array([[_slope(config, params, name, direction, batch, near, seed).mean()] for seed in seeds]) - each.mean()
        # a sum over tokens and over coordinates, of either sign: its rounding is that of the terms
        terms = np.abs(each).mean() + np.abs(gradient[name]).sum()
        budget = numerics.row_budget(each.mean(keepdims=True)[0], errors, dtype, LENGTH * ROWS, gradient=True)
        budget = budget + numerics.formula(dtype, max(p.size, LENGTH * ROWS), gradient=True) * terms
        found = (gradient[name].astype(np.float64) * direction).sum()
        assert gradient[name].shape == p.shape
        assert numerics.share(np.array([found]), np.array([each.mean()]), budget).max() <= 1, name
    squares = sum((g.astype(np.float64) ** 2).sum() for g in gradient.values())
    assert any(np.abs(g).max() > 0 for g in gradient.values())
    assert result.norm == pytest.approx(np.sqrt(squares), rel=numerics.formula(dtype, 1000))


@pytest.mark.parametrize("head", ["categorical", "bernoulli", "gaussian"])
def test_only_scored_targets_count_and_only_valid_tokens_are_read(backend, head, tiny, close):
    random = np.random.default_rng(0)
    if head == "categorical":
        train = tiny(overrides={"vocab_size": 16}, backend=backend, dtype="float64")
        rows = random.integers(0, 16, (3, 7))
    else:
        train = tiny("cram-video", {"frame_size": 4, "frame_head": head}, backend=backend, dtype="float64")
        rows = random.random((3, 7, 4)).astype(np.float32)
    config = train.validate()
    params = init_params(config, 1, "float64")
    scored, reset, valid = random.random((3, 3, 6)) < np.array([0.6, 0.2, 0.8])[:, None, None]
    batch = Batch(rows[:, :-1], rows[:, 1:], scored, reset=reset, valid=valid)
    trainer = open_trainer(train, config)
    trainer.init(params)
    logits, _ = create(config, params).forward(batch.inputs, reset=reset, valid=valid)
    nats = nll(config, logits[scored], batch.targets[scored])
    assert batch.count == nats.size
    close(trainer.gradient(batch, 0)[0].loss, nats.mean(), "float64")
