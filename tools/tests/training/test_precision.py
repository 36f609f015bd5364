"""float16 with loss scaling, averaged weights, blocks computed again, compiled steps, and a loop that runs ahead of the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import Arrays, InputError, init_params
from unisono_tools.backends import open_trainer
from unisono_tools.backends.base import GROWTH, SCALE, SCALE_LIMIT, Batch, Step, Trainer, dropout_seeds, router_noise
from unisono_tools.config import Optimizer, TrainConfig
from unisono_tools.train import checkpoint, train
from unisono_tools.train.logs import read
from unisono_tools.train.loop import AHEAD

SMALL = {
    "cram-1m": {"n_layers": 3},
    "maru-1m": {"n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4, "router": "gumbel"},
}


def _trainer(plan: TrainConfig, **changed: Any) -> Trainer:
    config = plan.validate()
    trainer = open_trainer(plan, config)
    trainer.init(init_params(config, 0, plan.param_dtype))
    if changed:
        trainer.init(trainer.params(), {**trainer.optimizer_state(), **{name: np.array([value]) for name, value in changed.items()}})
    return trainer


def _batch(plan: TrainConfig, step: int = 0) -> Batch:
    rows = np.random.default_rng(step).integers(0, 256, (plan.batch_size, plan.seq_len + 1))
    return Batch(rows[:, :-1], rows[:, 1:])


def test_a_step_whose_gradient_overflows_is_skipped_with_half_the_scale_after_it(backend, tiny):
    plan = tiny("cram-1m", backend=backend, dtype="float16", ema=0.9)
    assert _trainer(plan).optimizer_state()["scale"].tolist() == [SCALE]
    trainer = _trainer(plan, scale=np.float32(SCALE_LIMIT))
    scale, taken = SCALE_LIMIT, []
    for step in range(12):
        before = {**trainer.params(), **trainer.optimizer_state(), **{f"ema.{n}": a for n, a in (trainer.average() or {}).items()}}
        result = trainer.grad_step(_batch(plan, step), step, 1e-3).read()
        after = {**trainer.params(), **trainer.optimizer_state(), **{f"ema.{n}": a for n, a in (trainer.average() or {}).items()}}
        assert np.isfinite(result.loss)
        assert result.scale == scale
        assert result.skipped == (not np.isfinite(result.norm))
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        if result.skipped:
            assert moved <= {"scale", "scale_steps", "skipped"}
            scale /= 2
        else:
            assert {"count", "norm.weight", "m.norm.weight", "ema.norm.weight"} <= moved
        taken.append(result.skipped)
        assert after["scale"].tolist() == [scale]
    assert taken == sorted(taken, reverse=True)
    assert 0 < sum(taken) < 12
    state = trainer.optimizer_state()
    assert [state[name].tolist() for name in ("skipped", "count", "scale_steps")] == [[sum(taken)], [12 - sum(taken)], [12 - sum(taken)]]


def test_the_scale_grows_after_so_many_good_steps(backend, tiny):
    plan = tiny(backend=backend, dtype="float16")
    trainer = _trainer(plan, scale=np.float32(256), scale_steps=GROWTH - 1, skipped=0)
    trainer.grad_step(_batch(plan), 0, 1e-3).read()
    state = trainer.optimizer_state()
    assert (state["scale"].tolist(), state["scale_steps"].tolist()) == ([512], [0])


def test_the_scale_is_not_in_what_is_learned(backend, tiny):
    """Norm, clipping and moments are those of the loss itself: powers of two come and go without a trace."""
    plan = tiny(backend=backend, dtype="float16", optimizer=Optimizer(clip=0.01))
    found = []
    for scale in (2.0**10, 2.0**12):
        trainer = _trainer(plan, scale=np.float32(scale), scale_steps=0, skipped=0)
        result, gradient = trainer.gradient(_batch(plan), 0)
        step = trainer.grad_step(_batch(plan), 0, 1e-3).read()
        assert (step.loss, step.norm) == (result.loss, result.norm)
        moment = trainer.optimizer_state()["m.norm.weight"]
        opt = plan.optimizer
        wanted = (1 - opt.beta1) * gradient["norm.weight"] * (opt.clip / result.norm)
        assert np.abs(moment - wanted).max() <= numerics.rounding("float32", 8) * np.abs(wanted).max()
        found.append((result.norm, gradient["norm.weight"]))
    assert abs(found[0][0] - found[1][0]) <= numerics.rounding("float16", 8) * found[0][0]


def test_a_gradient_that_no_scale_mends_has_diverged():
    assert Step(float("nan"), 1.0, SCALE, True).diverged
    assert not Step(1.0, float("inf"), SCALE, True).diverged
    assert Step(1.0, float("inf"), 1.0, True).diverged


def test_float16_and_averages_go_on_with_the_same_bits(backend, tiny, tmp_path, command):
    plan = tiny("cram-1m", backend=backend, dtype="float16", ema=0.9, threads=1, steps=10, keep=9, eval_every=5)
    first = train(dataclasses.replace(plan, steps=2))
    saved = checkpoint.load(first.checkpoint)
    saved.optimizer["scale"] = np.array([SCALE_LIMIT], np.float32)
    checkpoint.save(first.run, dataclasses.replace(saved, train=plan))
    whole = train(plan)
    rows = [row for row in read(whole.run / "log.jsonl") if "loss" in row]
    assert rows[-1]["skipped_steps"] > 0
    assert rows[2]["loss_scale"] == SCALE_LIMIT
    assert "gradient_norm" not in rows[2]
    folder = tmp_path / "halves"
    for step, source in checkpoint.steps(whole.run).items():
        if step <= 4:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            source.rename(folder / "checkpoints" / source.name)
    again = train(dataclasses.replace(plan, out=str(folder)))
    for name in (checkpoint.MODEL, checkpoint.EMA, checkpoint.OPTIMIZER):
        assert (again.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()
    # what a run is evaluated by is what its folder means
    end = [row["validation_loss"] for row in read(whole.run / "log.jsonl") if "validation_loss" in row][-1]
    code, out, _ = command("eval", whole.run, "--backend", backend, "--dtype", "float32", "--limit", 64)
    assert code == 0
    assert f"step-00000010/{checkpoint.EMA}" in out
    assert abs(float(out.split("perplexity")[1].split()[0]) - np.exp(end)) <= numerics.rounding("float16", 64) * np.exp(end)


def test_averaged_weights(backend, tiny, close):
    plan = tiny(backend=backend, dtype="float64", ema=0.5)
    trainer = _trainer(plan)
    average: Arrays = trainer.params()
    for step in range(12):
        trainer.grad_step(_batch(plan, step), step, 1e-2)
        share = 1 - min(0.5, (1 + step) / (10 + step))
        average = {name: a + share * (trainer.params()[name] - a) for name, a in average.items()}
    found = trainer.average()
    assert found is not None
    for name, a in average.items():
        close(found[name], a, "float64", name)
    assert np.abs(found["norm.weight"] - trainer.params()["norm.weight"]).max() > 0
    ids = _batch(plan).inputs
    seen, _ = trainer.reader().forward(ids, trainer.reader().init_state(4))
    other = _trainer(dataclasses.replace(plan, ema=0.0))
    other.init(found)
    assert np.array_equal(seen, other.reader().forward(ids, other.reader().init_state(4))[0])
    assert other.average() is None


@pytest.mark.parametrize("model", ["cram-1m", "maru-1m"])
def test_blocks_computed_again_are_the_same_and_keep_less(backend, model, tiny, close):
    plan = tiny(model, {"dropout": 0.25, **SMALL[model]}, backend=backend, dtype="float64", batch_size=2, seq_len=8)
    again = dataclasses.replace(plan, gradient_checkpointing=True)
    (first, g), (second, h) = (_trainer(p).gradient(_batch(p), 0) for p in (plan, again))
    close(second.loss, first.loss, "float64")
    for name in g:
        close(h[name], g[name], "float64", name)
    kept = _kept_by_jax if backend == "jax" else _kept_by_torch
    whole, less = (kept(_trainer(p), _batch(p)) for p in (plan, again))
    assert 0 < 3 * less < 2 * whole


def _kept_by_torch(trainer: Any, batch: Batch) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside the weights."""
    import torch

    held: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        nll = trainer.objective(**trainer._arguments(batch, 0, 0))[0]
    assert nll.requires_grad
    return sum(held.values())


def _kept_by_jax(trainer: Any, batch: Batch) -> int:
    import jax
    from unisono_tools.backends.jax.objective import nats

    noise = router_noise(trainer.config, 0, 0, 0, batch.targets.shape)
    marks, seeds = (None, None, None, None), dropout_seeds(trainer.config, 0, 0, 0)
    arrays = (batch.inputs.astype(np.int32), batch.targets.astype(np.int32), *marks, seeds, noise, 1.0, None)

    def residuals(named: Any) -> Any:
        return jax.vjp(lambda named: nats(named, trainer.buffers, trainer.model, False, *arrays)[0], named)[1]

    with trainer._precision():
        kept = jax.tree.leaves(jax.eval_shape(residuals, trainer.named))
    weights = {a.shape for a in trainer.named.values()}
    return sum(a.size * a.dtype.itemsize for a in kept if a.shape not in weights)


def test_compiled_steps(backend, tiny, monkeypatch, close):
    plan = tiny(overrides={"n_layers": 1, "dropout": 0.25}, backend=backend, dtype="float64", compile=True)
    if backend == "jax":
        with pytest.raises(InputError, match=r"compile: true with backend jax.*leave it out"):
            train(plan)
        return
    import torch

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend="aot_eager", fullgraph=True))
    found = _trainer(plan).gradient(_batch(plan), 0)
    truth = _trainer(dataclasses.replace(plan, compile=False)).gradient(_batch(plan), 0)
    close(found[0].loss, truth[0].loss, "float64")
    for name in found[1]:
        close(found[1][name], truth[1][name], "float64", name)

    def missing(*_: Any) -> None:
        raise RuntimeError("no compiler")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend=missing))
    with pytest.raises(InputError, match=r"compile: .*leave it out, or see that"):
        train(plan)


def test_the_host_runs_ahead_and_reads_all_before_it_saves(backend, tiny, monkeypatch):
    asked: list[int] = []
    order: list[str] = []

    class Watched:
        def __init__(self, pending: Any) -> None:
            self.pending = pending

        def read(self) -> Step:
            asked.pop(0)
            return self.pending.read()

    def opened(*args: Any) -> Trainer:
        trainer = open_trainer(*args)
        step, params = trainer.grad_step, trainer.params

        def grad_step(batch: Batch, number: int, lr: float) -> Watched:
            order.append(f"{len(asked)} waiting")
            asked.append(number)
            return Watched(step(batch, number, lr))

        def saved() -> Arrays:
            order.append(f"saved with {len(asked)}")
            return params()

        trainer.grad_step, trainer.params = grad_step, saved  # pyright: ignore[reportAttributeAccessIssue]
        return trainer

    monkeypatch.setattr("unisono_tools.train.loop.open_trainer", opened)
    train(tiny(backend=backend, steps=6, checkpoint_every=4, eval_every=100))
    ahead = [f"{min(i, AHEAD)} waiting" for i in range(4)]
    assert order == [*ahead, "saved with 0", *ahead[:2], "saved with 0"]


def test_where_no_graph_can_be_none_is_made(backend, tiny):
    """What graphs do is in tools/tests/bench/test_graphs.py."""
    plan = tiny(backend=backend)
    said = {"jax": r"cuda_graphs: true with backend jax.*leave it out", "torch": r"cuda_graphs: true on cpu; give one GPU.*leave it out"}
    with pytest.raises(InputError, match=said[backend]):
        _trainer(dataclasses.replace(plan, cuda_graphs=True))
    results = [_trainer(dataclasses.replace(plan, cuda_graphs=how)).grad_step(_batch(plan), 0, 1e-2).read() for how in ("auto", False)]
    assert plan.cuda_graphs == "auto"
    assert results[0] == results[1]
