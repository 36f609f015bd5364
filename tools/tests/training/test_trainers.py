"""What a trainer does between two batches: AdamW, clipping, accumulation, dropout, precisions, positions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import InputError, init_params
from unisono_tools.backends import backend as open_backend
from unisono_tools.backends import open_trainer
from unisono_tools.backends.base import Batch, Trainer
from unisono_tools.config import DataChoice, Optimizer, TrainConfig
from unisono_tools.data import load_corpus
from unisono_tools.precompute import precompute
from unisono_tools.train.loader import loader, starting_state


def _trainer(train: TrainConfig, seed: int = 0) -> Trainer:
    config = train.validate()
    trainer = open_trainer(train, config)
    trainer.init(init_params(config, seed, train.param_dtype))
    return trainer


def _batch(train: TrainConfig, step: int = 0) -> Batch:
    rows = np.random.default_rng(step).integers(0, 256, (train.batch_size, train.seq_len + 1))
    return Batch(rows[:, :-1], rows[:, 1:])


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
def test_adamw_is_the_published_one(backend, tiny, close, clip):
    # Loshchilov & Hutter 2019, algorithm 2, after clipping to a global norm of `clip`
    opt = Optimizer(lr=1e-2, clip=clip)
    train = tiny("cram-1m", backend=backend, dtype="float64", optimizer=opt, batch_size=2, seq_len=5)
    trainer = _trainer(train)
    p = trainer.params()
    m, v = ({name: np.zeros_like(a) for name, a in p.items()} for _ in range(2))
    decays = {name: opt.weight_decay * spec.weight_decay for name, spec in trainer.config.params().items()}
    assert set(decays.values()) == {0.0, opt.weight_decay}
    for t in range(1, 4):
        batch, lr = _batch(train, t), 1e-2 / t
        result, g = trainer.gradient(batch, t)
        norm = np.sqrt(sum((a**2).sum() for a in g.values()))
        close(result.norm, norm, "float64")
        factor = min(1.0, clip / norm) if clip else 1.0
        for name in p:
            m[name] = opt.beta1 * m[name] + (1 - opt.beta1) * factor * g[name]
            v[name] = opt.beta2 * v[name] + (1 - opt.beta2) * (factor * g[name]) ** 2
            step = m[name] / (1 - opt.beta1**t) / (np.sqrt(v[name] / (1 - opt.beta2**t)) + opt.eps)
            p[name] = p[name] - lr * (step + decays[name] * p[name])
        assert trainer.grad_step(batch, t, lr).read() == result
    state = trainer.optimizer_state()
    assert state["count"].tolist() == [3]
    for name, value in trainer.params().items():
        close(value, p[name], "float64", name)
        close(state[f"m.{name}"], m[name], "float64", name)
        close(state[f"v.{name}"], v[name], "float64", name)


def test_accumulated_parts_are_the_whole_batch(backend, tiny, close):
    train = tiny(backend=backend, dtype="float64")
    random = np.random.default_rng(0)
    size = (train.batch_size, train.seq_len)
    # microbatches of unequal counts
    marks = {"scored": random.random(size) < 0.7, "reset": random.random(size) < 0.2, "valid": random.random(size) < 0.8}
    batch = dataclasses.replace(_batch(train), **marks)
    whole, g = _trainer(train).gradient(batch, 0)
    accumulated, h = _trainer(dataclasses.replace(train, accumulation=4)).gradient(batch, 0)
    close(accumulated.loss, whole.loss, "float64")
    for name in g:
        close(h[name], g[name], "float64", name)


def test_dropout_is_a_function_of_seed_and_step(backend, tiny):
    train = tiny(overrides={"dropout": 0.5}, backend=backend)
    losses = [
        _trainer(dataclasses.replace(train, seed=seed)).gradient(_batch(train), step)[0].loss for seed, step in ((0, 0), (0, 0), (0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]
    off = _trainer(tiny(backend=backend)).gradient(_batch(train), 0)[0].loss
    assert off not in losses


def test_each_accumulated_part_has_masks_of_its_own(backend, tiny):
    """Of two microbatches that are alike: with one mask for both, their loss would be that of the first."""
    train = tiny(overrides={"dropout": 0.5}, backend=backend, dtype="float64", batch_size=2)
    half = _batch(train)
    both = Batch(np.concatenate([half.inputs] * 2), np.concatenate([half.targets] * 2))
    alone = _trainer(train).gradient(half, 0)[0].loss
    twice = _trainer(dataclasses.replace(train, batch_size=4, accumulation=2)).gradient(both, 0)[0].loss
    assert abs(twice - alone) > numerics.OTHER_MACHINE * numerics.formula("float64", both.inputs.size) * alone


def test_the_balance_load_is_that_of_every_part(backend, tiny):
    small = {"d_model": 8, "n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4, "router": "gumbel"}
    train = tiny("maru-1m", small, backend=backend, dtype="float64", accumulation=2, seq_len=4)
    config = train.validate()
    params = init_params(config, 1, "float64")
    random = np.random.default_rng(1)
    params = {name: p + random.normal(size=p.shape) * config.params()[name].trainable for name, p in params.items()}

    def load(rows: np.ndarray) -> np.ndarray:
        trainer = open_trainer(train, config)
        trainer.init(params)
        trainer.grad_step(Batch(rows[:, :-1], rows[:, 1:]), 0, 1e-3)
        return trainer.params()["layers.0.cell.balance_load"]

    rows, other = random.integers(0, 256, (2, 4, 5))
    for part in (slice(0, 2), slice(2, 4)):
        changed = rows.copy()
        changed[part] = other[part]
        assert (load(changed) != load(rows)).any()


def test_dropout_keeps_the_mean(backend, tiny):
    config = tiny(overrides={"dropout": 0.25, "d_model": 32, "n_layers": 1}).validate()
    (mask,) = map(np.asarray, open_backend(backend).dropout_masks(config, np.array([7], np.uint32), (8, 64), "float32"))
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1) / np.float32(0.75)}
    assert abs(mask.mean() - 1) < numerics.sampling(mask.size, mask.std())


@pytest.mark.parametrize(("factor", "loss"), [(np.nan, False), (1e25, True)])
def test_a_step_that_is_not_finite_changes_nothing(backend, tiny, factor, loss):
    train = tiny(backend=backend)
    trainer = _trainer(train)
    trainer.grad_step(_batch(train), 0, 1e-3)
    params = {name: (p * factor if name == "head.weight" else p).astype(p.dtype) for name, p in trainer.params().items()}
    moments = trainer.optimizer_state()
    trainer.init(params, moments)
    step = trainer.grad_step(_batch(train), 1, 1e-3).read()
    assert (np.isfinite(step.loss), np.isfinite(step.norm), step.skipped) == (loss, False, True)
    assert all(np.array_equal(p, params[name], equal_nan=True) for name, p in trainer.params().items())
    assert all(np.array_equal(a, moments[name]) for name, a in trainer.optimizer_state().items())


def test_bfloat16_keeps_float32_parameters(backend, tiny):
    train = tiny("cram-1m", backend=backend, dtype="bfloat16")
    trainer = _trainer(train)
    batch = _batch(train)
    losses = [trainer.grad_step(batch, step, 1e-2).read().loss for step in range(8)]
    assert losses[-1] < losses[0]
    assert {a.dtype for a in trainer.params().values()} == {np.dtype(np.float32)}
    assert {a.dtype for name, a in trainer.optimizer_state().items() if name != "count"} == {np.dtype(np.float32)}


def test_reader_sees_the_weights_as_they_are_now(backend, tiny):
    train = tiny(backend=backend)
    trainer = _trainer(train)
    batch = _batch(train)
    logits = [trainer.reader().forward(batch.inputs, trainer.reader().init_state(4))[0] for _ in range(2)]
    trainer.grad_step(batch, 0, 1e-2)
    after, _ = trainer.reader().forward(batch.inputs, trainer.reader().init_state(4))
    assert np.array_equal(logits[0], logits[1])
    assert not np.array_equal(after, logits[0])


def test_random_positions(tiny):
    train = tiny("cram-1m", {"position_offset": "random", "position_bits": 12}, batch_size=64)
    config = train.validate()
    states = [starting_state(train, config, step) for step in (0, 0, 1)]
    first, again, other = (state["position"] for state in states if state is not None)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.int32
    assert 0 <= first.min() < 2**11 < first.max() < 2**12
    assert starting_state(tiny("cram-1m"), config.replace(position_offset="zero"), 0) is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_positions_have_the_loss_of_their_sequence(backend, dtype, tiny, text, tmp_path, close):
    # Algorithm 1: every position of the text at once is the text read in order
    train = tiny(backend=backend, dtype=dtype)
    config, corpus = train.validate(), load_corpus(text)
    xi = precompute(config, corpus.train, tmp_path / "xi")
    trainer = _trainer(train)
    ids = np.asarray(corpus.train[:200]).astype(np.int64)
    by_position, g = trainer.gradient(Batch(np.array(xi.xi[:199]), ids[1:], precomputed=True), 0)
    by_sequence, h = trainer.gradient(Batch(ids[None, :-1], ids[None, 1:]), 0)
    # ξ is stored in float32
    close(by_position.loss, by_sequence.loss, "float32")
    for name in g:
        close(g[name], h[name], "float32", name)


def test_minibatches_of_positions(backend, tiny, text, tmp_path):
    train = tiny(backend=backend, mode="positions", data=DataChoice(corpus=str(text), precomputed=str(tmp_path / "xi")), batch_size=32)
    config, corpus = train.validate(), load_corpus(text)
    precompute(config, corpus.train, tmp_path / "xi")
    batches = loader(train, config, corpus)
    batch = batches(3)
    assert batch.inputs.shape == (32, 8)
    assert batch.targets.shape == (32,)
    assert np.array_equal(batches(3).inputs, batch.inputs)
    assert not np.array_equal(batches(4).inputs, batch.inputs)
    assert batch.count == 32
    trainer = _trainer(train)
    assert trainer.grad_step(batch, 3, 1e-3).read().loss > 0


def test_processes_that_are_not_told_where_to_meet(backend, tiny, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}.items():
        monkeypatch.setenv(name, value)
    cases = [("a", "MASTER_PORT: 'a'"), ("", "MASTER_PORT: ''"), ("1", "MASTER_ADDR: ")]
    for port, said in cases if backend == "torch" else cases[:1]:  # JAX meets at localhost where it is not told
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(InputError, match=said):
            open_trainer(tiny(backend=backend), tiny().validate())
