"""Runs of a table, one after another, in a process of their own if need be: trained or continued, then judged on the test split.

`python -m unisono_tools.experiments.worker` reads lines of JSON, the folder of a run, and answers each once its result is there: so many
runs import once, and compile each kernel once. It ends after a run that failed, which may have left the device unusable.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from unisono_spec.contract import InputError, count_params
from unisono_spec.contract.files import write_bytes

import unisono_tools
from unisono_tools.backends import backend, open_reader
from unisono_tools.bench.report import about
from unisono_tools.config import TrainConfig, default_backend, from_dict
from unisono_tools.evaluation import Progress, evaluate, part
from unisono_tools.reading import read_yaml
from unisono_tools.tasks import open_task
from unisono_tools.train import train as run
from unisono_tools.train.checkpoint import model_file
from unisono_tools.train.datamodule import load
from unisono_tools.train.logs import NAME as LOG
from unisono_tools.train.logs import read as read_log
from unisono_tools.train.progress import Evaluating
from unisono_tools.train.task_datamodule import evaluate_task

CONFIG, RESULT = "row.yaml", "result.json"
PACKAGES = ("unisono", "numpy", "torch", "triton", "jax", "flax")
LOSSES = 60  # of a run's minibatches that are kept, in bits a target
EXAMPLES = 1000  # of each setting of a task, on the test split, and at most eight times those of an evaluation


def work(train: TrainConfig, console: Console | None = None, alone: bool = False) -> dict[str, Any]:
    """What a table keeps of a run. status: "done", or what cut it short. ended: what the validation said that made it done before its last
    step. alone: in this process, whose memory is then told."""
    console = console or Console(stderr=True, quiet=True)
    found: dict[str, Any] = {"seed": train.seed, "lr": train.optimizer.lr, "steps": 0, "of": train.steps}
    found |= origin(train.backend, train.device)
    start = time.monotonic()
    try:
        result = run(train, console=console)
        cut = "out of time" if result.signal is None else f"stopped by {result.signal.name}"
        found |= {"steps": result.steps, "of": result.of, "status": "done" if result.why or result.steps >= result.of else cut}
        found |= {"ended": result.why} if result.why else {}
        with Evaluating(console) as progress:
            found |= _tested(train, result.run, progress)
    except (InputError, RuntimeError) as error:  # of memory, too: the other rows go on
        found["status"] = f"failed: {' '.join(str(error).split())[:200]}"
    rows, config = read_log(train.folder / LOG), train.model.config()
    scored = open_task(train.data.task, train.data.task_options).metric if train.data.task else None
    metric = f"validation_{scored or 'bits'}"
    unit = train.batch_size * (1 if train.data.task else train.seq_len)  # examples, or tokens, a step
    speeds = [row["rate"] for row in rows if row.get("rate")]
    curve = [[row["step"] * unit, row[metric]] for row in rows if metric in row]
    scores = [value for _, value in curve]
    trained = [[row["step"] * unit, row["loss"] / math.log(2)] for row in rows if "loss" in row]
    return found | {
        "epochs": train.epochs,
        "losses": trained[:: max(1, len(trained) // LOSSES)],
        "parameters": count_params(config),
        "metric": metric.removeprefix("validation_"),
        "curve": curve,
        "score": (max if scored else min)(scores) if scores else None,
        "tokens_a_second": statistics.median(speeds) if speeds else None,
        "peak_bytes": backend(train.backend or default_backend()).peak_bytes() if alone else None,
        "seconds": round(time.monotonic() - start, 1),
    }


def _tested(train: TrainConfig, folder: Path, progress: Progress | None = None) -> dict[str, dict[str, float]]:
    """By the best weights. tests: bits a token of the test split, or the task's metric by setting; bits: then bits a target besides."""
    dtype = train.dtype if train.dtype != "float16" else "float32"
    reader = open_reader(model_file(folder), train.backend or default_backend(), dtype, train.device)
    if not train.data.task:
        text = load(train.data).corpora[0]
        found = evaluate(reader, text.split("test"), train.data.eval_tokens, train.data.eval_window or 0, progress)
        return {"tests": {"bits": found.bits}}
    task = open_task(train.data.task, train.data.task_options)
    most, settings = min(EXAMPLES, 8 * train.data.eval_examples), list(task.settings("test"))
    scores, bits = {}, {}
    for i, setting in enumerate(settings):
        size = task.size("test", setting)
        number = most if size is None else min(size, most)
        found = evaluate_task(reader, task, "test", setting, number, part(progress, i, len(settings)))
        scores[setting], bits[setting] = found.score, found.bits
    return {"tests": scores, "bits": bits} if task.metric else {"tests": bits}


def origin(name: str | None, device: str | None) -> dict[str, str]:
    """Of what is run here: date, device, versions and commit."""
    found = about("", backend(name or default_backend()).device_name(device), *PACKAGES)
    return {key: value for key, value in found.items() if key != "command"} | {"commit": commit()}


def commit() -> str:
    """Of the checkout that these files lie in; $GIT_COMMIT where they lie in none."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    place = Path(unisono_tools.__file__).parent
    try:
        said = subprocess.run(["git", "-C", str(place), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def do(folder: Path, alone: bool = False, console: Console | None = None) -> bool:
    """The run whose config lies in the folder; its result is written there. Whether it did not fail. console: what tells how far it is."""
    train = from_dict(read_yaml(folder / CONFIG))
    found = work(dataclasses.replace(train, threads=train.threads or 1), console, alone)
    write_bytes(folder / RESULT, json.dumps(_plain(found)).encode())
    return not str(found["status"]).startswith("failed")


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    alone = True
    for line in sys.stdin:
        folder = Path(json.loads(line))
        with (folder / "output.txt").open("ab") as said:
            os.dup2(said.fileno(), 2)
        if not do(folder, alone):
            return 1
        print(line.strip(), file=answers, flush=True)
        alone = backend(default_backend()).forget_peak()
    return 0


def _plain(value: Any) -> Any:
    """Infinite and undefined numbers are null: JSON has none."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
