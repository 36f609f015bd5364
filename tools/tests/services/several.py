"""Trains each of CASES for a few steps, alone or as one of the processes that torchrun starts; the first one writes what came out.

python -m torch.distributed.run --nproc-per-node 2 tools/tests/services/several.py FOLDER
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import init_params
from unisono_tools.backends import backend, open_trainer
from unisono_tools.backends.base import Batch
from unisono_tools.config import DataChoice, ModelChoice, TrainConfig, processes

STEPS = 3
MARU = {"d_model": 8, "n_layers": 2, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4, "router": "gumbel", "dropout": 0.25}
LAT = {"d_model": 8, "n_layers": 2, "head_width": 4, "qk_width": 4}
CRAM = {"d_model": 8, "n_layers": 2, "dropout": 0.25}
INFINITY = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ffn": 8, "dropout": 0.25}


def _case(preset: str, overrides: dict[str, Any], **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"dtype": "float64", "batch_size": 8, "seq_len": 12, "threads": 1, "backend": "torch", "accumulation": 2}
    return TrainConfig(model=ModelChoice(preset, overrides), **{**fields, **changes})


TORCH = {
    "replicas": _case("cram-1m", CRAM, ema=0.9),
    "replicas, noise, learned states": _case("maru-1m", MARU),
    "replicas, carried": _case("maru-1m", MARU, data=DataChoice(order="streamed")),
    "shards": _case("cram-1m", CRAM, parallel="fsdp", ema=0.9, gradient_checkpointing=True),
    "shards, learned states": _case("maru-1m", MARU, parallel="fsdp", accumulation=1),
    "shards, tied": _case("lat-1m", {**LAT, "tie_head": True, "head_bias": False}, parallel="fsdp"),
    "shards, compiled": _case("lat-1m", {**LAT, "dropout": 0.25, "positions": "rope"}, parallel="fsdp", compile=True),
    "neighbours": _case("infinityformer-1m", INFINITY, context=2),
    "neighbours, noise, learned states": _case("maru-1m", MARU, context=2, gradient_checkpointing=True),
    "neighbours, windows": _case("based-1m", {**LAT, "n_layers": 3, "attention": ["conv", "linear", "window"]}, context=2, accumulation=1),
    "neighbours, positions": _case("cram-1m", {**CRAM, "position_offset": "random"}, context=2),
}
JAX = {
    "copies": _case("cram-1m", CRAM, ema=0.9),
    "copies, noise, carried": _case("maru-1m", {**MARU, "n_layers": 1}, data=DataChoice(order="streamed")),
    "shards": _case("lat-1m", {**LAT, "dropout": 0.25}, parallel="fsdp", accumulation=1),
    "neighbours": _case("infinityformer-1m", INFINITY, context=2),
    "neighbours, noise, learned states": _case("maru-1m", {**MARU, "n_layers": 1}, context=2, gradient_checkpointing=True),
    "neighbours, windows": _case("based-1m", {**LAT, "n_layers": 3, "attention": ["conv", "linear", "window"]}, context=2, accumulation=1),
    "neighbours, positions": _case("cram-1m", {**CRAM, "position_offset": "random"}, context=2),
}
CASES = {"torch": TORCH, "jax": {name: dataclasses.replace(plan, backend="jax") for name, plan in JAX.items()}}


def alone(plan: TrainConfig) -> TrainConfig:
    """The same in one process: as many microbatches, numbered alike."""
    # each process of PyTorch's computes microbatches of its own; JAX spreads each one over its devices
    shares = 1 if plan.backend == "jax" else 2 // plan.context
    return dataclasses.replace(plan, parallel="ddp", context=1, compile=False, accumulation=plan.accumulation * shares)


def batch(plan: TrainConfig, step: int) -> Batch:
    from unisono_tools.train.loader import starting_state

    random = np.random.default_rng(step)
    rows = random.integers(0, 256, (plan.batch_size, plan.seq_len + 1))
    scored, reset, valid = random.random((3, plan.batch_size, plan.seq_len)) < np.array([0.7, 0.1, 0.9])[:, None, None]
    config, carried = plan.model.config(), plan.data.order == "streamed"
    state = None if carried else starting_state(plan, config, step)
    groups = random.integers(0, 3, (plan.batch_size, 1)) == np.arange(3)
    return Batch(rows[:, :-1], rows[:, 1:], scored, state, reset=reset, valid=valid, carried=carried, groups=groups)


def run(plan: TrainConfig) -> dict[str, np.ndarray]:
    config = plan.validate()
    trainer = open_trainer(plan, config)
    trainer.init(init_params(config, 0, "float64"))
    steps = [trainer.grad_step(batch(plan, step), step, 1e-3).read() for step in range(STEPS)]
    carried, average = trainer.carried(), trainer.average()
    found = {
        "loss": np.array([s.loss for s in steps]),
        "norm": np.array([s.norm for s in steps]),
        "groups": np.array([s.groups for s in steps]),
        **trainer.params(),
        **trainer.optimizer_state(),
        **{f"carried.{name}": a for name, a in (carried or {}).items()},
        **{f"average.{name}": a for name, a in (average or {}).items()},
    }
    reader = trainer.reader()
    if trainer.rank == 0:
        found["logits"] = reader.forward(batch(plan, 0).inputs, reader.init_state(plan.batch_size))[0]
    return found


if __name__ == "__main__":
    from safetensors.numpy import save_file

    for name, plan in CASES[sys.argv[1]].items():
        devices = 2 if sys.argv[1] == "jax" and processes()[1] == 1 else 1
        found = run(dataclasses.replace(plan, devices=devices))
        if processes()[0] == 0:
            save_file({key: np.ascontiguousarray(a) for key, a in found.items()}, Path(sys.argv[2]) / f"{name}.safetensors")
    if sys.argv[1] == "torch":
        backend("torch").leave(0)
