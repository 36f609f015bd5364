"""Training handed from backend to backend, one process in each environment; the files that they leave are compared.

    python tools/tests/handover/relay.py train jax FOLDER        20 losses in float64, and a run of 10 steps
    python tools/tests/handover/relay.py train torch FOLDER      the same; continues jax's run, where there is one, to step 20
    python tools/tests/handover/relay.py compare FOLDER          needs neither: exit code 0 where everything agrees

Both backends share data order, initial weights, schedule and the optimiser's arithmetic, so 20 losses in float64 agree to AGREE, and a
run that changes hands half-way ends where one that does not ends.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from unisono_tools.backends import open_reader
from unisono_tools.config import DataChoice, ModelChoice, Optimizer, Schedule, TrainConfig
from unisono_tools.data import load_corpus
from unisono_tools.evaluation import evaluate
from unisono_tools.train import checkpoint, train
from unisono_tools.train.logs import read

# Demanded of 20 losses in float64 at learning rates up to 1e-3, without dropout (measured: 2e-15).
AGREE = 1e-10
BACKENDS = ("jax", "torch")
RELAYED = ("fixed", "adaptive", "maru")  # the runs that change hands; of the others, each backend's own are compared
MODELS = {
    "fixed": ModelChoice("cram-demo", {"d_model": 16, "n_layers": 2}),
    "adaptive": ModelChoice("cram-1m", {"d_model": 16, "n_layers": 2, "position_offset": "random"}),
    "lat": ModelChoice("lat-1m", {"d_model": 8, "n_layers": 2, "head_width": 4, "qk_width": 4}),
    "based": ModelChoice(
        "based-1m", {"d_model": 8, "n_layers": 3, "head_width": 4, "qk_width": 4, "attention": ["conv", "linear", "window"]}
    ),
    "infinityformer": ModelChoice("infinityformer-1m", {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ffn": 8, "dropout": 0.0}),
    "maru": ModelChoice(
        "maru-1m",
        {"d_model": 8, "n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4, "router": "gumbel"},
    ),
    "transformer": ModelChoice("transformer-1m", {"d_model": 8, "n_layers": 1, "head_width": 4}),
    "mamba": ModelChoice("mamba-1m", {"d_model": 8, "n_layers": 1}),
    "s4d": ModelChoice("s4d-1m", {"d_model": 8, "n_layers": 1, "d_state": 4}),
}
TEXT = "We hold these truths to be self-evident, that all are created equal. " * 60


def plan(folder: Path, model: str, backend: Literal["torch", "jax"], steps: int, out: str) -> TrainConfig:
    return TrainConfig(
        model=MODELS[model],
        data=DataChoice(corpus=str(folder / "text.txt"), eval_tokens=128, eval_window=32),
        optimizer=Optimizer(lr=1e-3),
        schedule=Schedule(warmup_steps=5),
        dtype="float64",
        steps=steps,
        batch_size=4,
        seq_len=32,
        eval_every=10,
        checkpoint_every=10,
        log_every=1,
        accumulation=2,
        backend=backend,
        out=str(folder / out),
    )


def run(backend: Literal["torch", "jax"], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    for model in MODELS:
        alone = plan(folder, model, backend, 20, f"{model}-{backend}")
        shutil.rmtree(alone.out, ignore_errors=True)
        train(alone)
        # what the other backend has half done is finished here, from its checkpoint of step 10
        other = BACKENDS[1 - BACKENDS.index(backend)]
        given = folder / f"{model}-{other}"
        if given.is_dir() and model in RELAYED:
            half = dataclasses.replace(alone, out=str(folder / f"{model}-{other}-{backend}"))
            shutil.rmtree(half.out, ignore_errors=True)
            shutil.copytree(given, half.out)
            checkpoint.remove(checkpoint.steps(Path(half.out))[20])
            train(half)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read(run / "log.jsonl") if "loss" in row]


def compare(folder: Path) -> bool:
    found = {}
    for model in MODELS:
        runs = sorted(path for path in folder.iterdir() if path.name.startswith(f"{model}-"))
        names = [path.name.removeprefix(f"{model}-") for path in runs]
        if not {"jax", "torch", *(["jax-torch"] if model in RELAYED else [])} <= set(names):
            sys.exit(f"{folder}: found {names}; run `train jax` and `train torch` first, each in its environment")
        curves = np.array([losses(path) for path in runs])
        assert curves.shape == (len(runs), 20)
        found[f"{model}: 20 losses of {', '.join(names)}"] = np.ptp(curves, 0).max()
        ends = [checkpoint.load(checkpoint.steps(path)[20]) for path in runs]
        found[f"{model}: weights"] = max(np.abs(end.params[n] - a).max() for end in ends for n, a in ends[0].params.items())
        found[f"{model}: moments"] = max(np.abs(end.optimizer[n] - a).max() for end in ends for n, a in ends[0].optimizer.items())
        ids = load_corpus(folder / "text.txt").validation
        scores = [evaluate(open_reader(checkpoint.model_file(path), "numpy", "float64"), ids, window=32).loss for path in runs]
        found[f"{model}: NumPy's loss of each"] = np.ptp(scores)
    for what, difference in found.items():
        print(f"{'ok  ' if difference <= AGREE else 'FAIL'} {what}: differ by {difference:.1e}, at most {AGREE:.0e}")
    (folder / "report.json").write_text(json.dumps({name: float(value) for name, value in found.items()}, indent=1))
    return bool(max(found.values()) <= AGREE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"] and len(sys.argv) == 3:
        sys.exit(0 if compare(Path(sys.argv[2])) else 1)
    if len(sys.argv) != 4 or sys.argv[1] != "train" or sys.argv[2] not in BACKENDS:
        sys.exit(__doc__)
    run("jax" if sys.argv[2] == "jax" else "torch", Path(sys.argv[3]))
