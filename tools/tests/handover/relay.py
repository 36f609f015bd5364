"""Training handed from backend to backend, one process in each environment; the files that they leave are compared.

    python tools/tests/handover/relay.py train jax FOLDER        20 losses in float64, and a run of 10 steps
    python tools/tests/handover/relay.py train torch FOLDER      the same; continues jax's run, where there is one, to step 20; and
                                                                 trains with parameters that err by a few roundings before each step
    python tools/tests/handover/relay.py compare FOLDER          needs neither: exit code 0 where everything agrees

Both backends share data order, initial weights, schedule and the optimiser's arithmetic, so their losses, weights and moments part by
no more than rounding makes them (numerics.training), and a run that changes hands half-way ends where one that does not ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from unisono_conformance import numerics
from unisono_tools.backends import open_reader
from unisono_tools.config import DataChoice, ModelChoice, Optimizer, Schedule, TrainConfig
from unisono_tools.data import load_corpus
from unisono_tools.evaluation import evaluate
from unisono_tools.train import checkpoint, train
from unisono_tools.train.logs import read

BACKENDS = ("jax", "torch")
REALISATIONS = 2  # of a training that errs
ERRING = "erring"
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
# beside accumulation and averages, which all have: marks where documents start, what is scored and valid, a state that is carried
FEEDS: dict[str, dict[str, Any]] = {
    "fixed": {"documents": "truncated"},
    "adaptive": {"documents": "truncated"},
    "lat": {"order": "streamed", "documents": "reset"},
    "maru": {"order": "streamed"},
}
DOCUMENTS = [f"We hold these truths{' to be self-evident' * (i % 4)}, that all are created equal. " * (1 + i % 2) for i in range(60)]


def plan(folder: Path, model: str, backend: Literal["torch", "jax"], steps: int, out: str) -> TrainConfig:
    return TrainConfig(
        model=MODELS[model],
        data=DataChoice(corpus=str(folder / "text.jsonl"), eval_tokens=128, eval_window=32, **FEEDS.get(model, {"documents": "reset"})),
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
        ema=0.9,
        backend=backend,
        out=str(folder / out),
    )


def run(backend: Literal["torch", "jax"], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
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
        for draw in range(REALISATIONS if backend == "torch" else 0):
            erring = dataclasses.replace(alone, out=str(folder / f"{model}-{ERRING}{draw}"))
            shutil.rmtree(erring.out, ignore_errors=True)
            with moved(draw):
                train(erring)


@contextlib.contextmanager
def moved(draw: int) -> Iterator[None]:
    """PyTorch trains with parameters that err by a few roundings before each step."""
    from unisono_tools.backends.torch import Trainer

    plain = Trainer.grad_step

    def grad_step(self: Trainer, batch: Any, step: int, lr: float) -> Any:
        self.init(numerics.jitter(self.params(), 100 * draw + step), self.optimizer_state(), self.carried(), self.average())
        return plain(self, batch, step, lr)

    Trainer.grad_step = grad_step
    try:
        yield
    finally:
        Trainer.grad_step = plain


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read(run / "log.jsonl") if "loss" in row]


def compare(folder: Path) -> bool:
    report, ids = {}, load_corpus(folder / "text.jsonl").validation
    for model in MODELS:
        runs = {path.name.removeprefix(f"{model}-"): path for path in sorted(folder.iterdir()) if path.name.startswith(f"{model}-")}
        wanted = {*BACKENDS, *(f"{ERRING}{i}" for i in range(REALISATIONS)), *(["jax-torch"] if model in RELAYED else [])}
        if not wanted <= set(runs):
            sys.exit(f"{folder}: found {sorted(runs)}; run `train jax` and `train torch` first, each in its environment")
        ends = {name: checkpoint.load(checkpoint.steps(path)[20]) for name, path in runs.items()}
        found = {
            "20 losses": {name: {"loss": np.array(losses(path))} for name, path in runs.items()},
            "weights": {name: end.params for name, end in ends.items()},
            "moments": {name: end.optimizer for name, end in ends.items()},
            "averages": {name: end.average or {} for name, end in ends.items()},
            "states carried": {name: end.carried or {} for name, end in ends.items()},
            "NumPy's loss of each": {
                name: {
                    "loss": np.array(
                        evaluate(open_reader(checkpoint.steps(path)[20] / checkpoint.MODEL, "numpy", "float64"), ids, window=32).loss
                    )
                }
                for name, path in runs.items()
            },
        }
        assert all(curve["loss"].shape == (20,) for curve in found["20 losses"].values())
        for what, by_run in found.items():
            erring, trained = ([arrays for name, arrays in by_run.items() if name.startswith(ERRING) == errs] for errs in (True, False))
            if not by_run["torch"]:
                continue  # nothing is carried
            largest = max(np.abs(a).max(initial=0) for a in by_run["torch"].values())
            budget = numerics.training(_apart([by_run["torch"], *erring]), largest, 4 * 32)
            report[f"{model}: {what}"] = _apart(trained) / budget
            print(f"{model}: {what} of {', '.join(n for n in runs if not n.startswith(ERRING))}", end=" ")
            print(f"differ by {_apart(trained):.1e}, {_apart(trained) / budget:.0%} of what rounding may do")
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    return max(report.values()) <= 1


def _apart(runs: list[dict[str, np.ndarray]]) -> float:
    """The largest difference of any number of any run from the first run's."""
    return max(float(np.abs(run[name] - a).max(initial=0)) for run in runs for name, a in runs[0].items())


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"] and len(sys.argv) == 3:
        sys.exit(0 if compare(Path(sys.argv[2])) else 1)
    if len(sys.argv) != 4 or sys.argv[1] != "train" or sys.argv[2] not in BACKENDS:
        sys.exit(__doc__)
    run("jax" if sys.argv[2] == "jax" else "torch", Path(sys.argv[3]))
