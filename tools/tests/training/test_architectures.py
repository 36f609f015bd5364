"""Every architecture is trained, saved, continued and read, by either backend."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec.contract import count_params, init_params
from unisono_spec.models import create
from unisono_tools.backends import open_trainer
from unisono_tools.backends.base import Batch, router_noise, trained
from unisono_tools.config import ModelChoice
from unisono_tools.evaluation import evaluate
from unisono_tools.train import checkpoint, train
from unisono_tools.train.logs import read

SMALL = {
    "lat-1m": {"d_model": 8, "n_layers": 2, "head_width": 4, "qk_width": 4, "dropout": 0.25},
    "based-1m": {"d_model": 8, "n_layers": 3, "head_width": 4, "qk_width": 4, "attention": ["conv", "linear", "window"]},
    "infinityformer-1m": {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ffn": 8},
    "transformer-1m": {"d_model": 8, "n_layers": 2, "head_width": 4},
    "mamba-1m": {"d_model": 8, "n_layers": 2},
    "s4d-1m": {"d_model": 8, "n_layers": 2, "d_state": 4},
    "maru-1m": {"d_model": 8, "n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4, "router": "gumbel"},
}


@pytest.mark.parametrize("preset", SMALL)
def test_learns_and_resumes(backend, preset, tiny, tmp_path):
    """Training lowers the loss; a run in two halves ends with the bits of one."""
    config = tiny(backend=backend, threads=1, eval_every=8, out=str(tmp_path / "whole"))
    config = dataclasses.replace(
        config, model=ModelChoice(preset, SMALL[preset]), data=dataclasses.replace(config.data, eval_window=32),
        optimizer=dataclasses.replace(config.optimizer, lr=1e-2), steps=8,
    )  # fmt: skip
    whole = train(config)
    losses = [row["loss"] for row in read(whole.run / "log.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    assert whole.best is not None
    assert np.isfinite(whole.best.loss)
    # the second half starts from the first half's files
    folder = tmp_path / "halves"
    for step, source in checkpoint.steps(whole.run).items():
        if step < 8:
            folder.mkdir(exist_ok=True)
            source.rename(folder / source.name)
    again = train(dataclasses.replace(config, out=str(folder)))
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert (again.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()


def test_noise_and_balance_are_for_training_only(backend, tiny):
    """The router's noise depends on (seed, step) alone, its balance bias moves with the load, and neither acts in evaluation."""
    train_config = dataclasses.replace(tiny(backend=backend, dtype="float64"), model=ModelChoice("maru-1m", SMALL["maru-1m"]))
    config = train_config.validate()
    params = init_params(config, 1, "float64")
    # initial values are so small that noise would hardly show
    random = np.random.default_rng(1)
    params = {name: p + 0.4 * random.normal(size=p.shape) * config.params()[name].trainable for name, p in params.items()}
    trainer = open_trainer(train_config, config)
    trainer.init(params)
    buffers = sorted(set(params) - set(trained(config)))
    assert [name.rsplit(".", 1)[1] for name in buffers] == ["balance_bias", "balance_load"]
    assert sum(params[name].size for name in trained(config)) == count_params(config)
    rows = np.random.default_rng(0).integers(0, 256, (4, 9))
    batch = Batch(rows[:, :-1], rows[:, 1:])
    first, again, other = (trainer.gradient(batch, step)[0].loss for step in (0, 0, 1))
    assert first == again != other
    assert not any(f"{kind}.{name}" in trainer.optimizer_state() for kind in "mv" for name in buffers)

    # the spec, given the same noise, has the same load and moves the same way
    noise = router_noise(config, train_config.seed, 0, 0, (4, 8))
    before = evaluate(trainer.reader(), rows.ravel(), window=8).loss
    trainer.grad_step(batch, 0, 1e-30)
    after = trainer.params()
    load = _load(config, params, rows[:, :-1], noise)
    average = 0.9 * params[buffers[1]] + 0.1 * load
    judge.same(after[buffers[1]], average, numerics.forms(spread=1))
    judge.same(after[buffers[0]], -config.balance_rate * (average - 0.5), numerics.forms(spread=1))
    assert np.abs(after[buffers[0]]).max() > 0
    assert evaluate(trainer.reader(), rows.ravel(), window=8).loss == before


def _load(config, params, tokens, noise):
    """The mean share of each bank, token by token."""
    from unisono_spec.ops import mom_gru

    shares, original = [], mom_gru.routing
    mom_gru.routing = lambda *args: shares.append(original(*args)) or shares[-1]
    try:
        create(config, params).forward(tokens, form="recurrent", noise=noise)
    finally:
        mom_gru.routing = original
    return np.mean(shares, (0, 1))
