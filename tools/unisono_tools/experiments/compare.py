"""Every model of one size, trained on the same tokens in the same order with the same optimiser, in one table and two figures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import unisono_spec
from rich.console import Console
from rich.table import Table
from unisono_spec.contract import Config, InputError, count_params, nearest, preset
from unisono_spec.contract.files import write_bytes

from unisono_tools.config import DataChoice, ModelChoice, Optimizer, Schedule, TrainConfig, default_backend
from unisono_tools.data import Corpus
from unisono_tools.experiments import figures, ngrams
from unisono_tools.experiments.inspect import dependency_matrix
from unisono_tools.experiments.match import FAMILIES, match
from unisono_tools.experiments.running import pool
from unisono_tools.signals import obey
from unisono_tools.train import train
from unisono_tools.train.checkpoint import model_file
from unisono_tools.train.logs import NAME as LOG
from unisono_tools.train.logs import read as read_log

ORDERS = (1, 2, 3)  # bytes of context of the n-grams that are drawn beside the models
EVALUATIONS = 12  # of each run, at equal distances
TOKENS = 48  # of a dependency matrix


@dataclasses.dataclass(frozen=True)
class Curve:
    """One model's runs.

    tokens: read before each evaluation; bits: a byte of the validation text then, the mean of all seeds; low, high: the least and the
    most; speed: training tokens a second, the median.
    """

    model: str
    backend: str
    parameters: int
    tokens: list[int]
    bits: list[float]
    speed: float
    seeds: int = 1
    low: list[float] = dataclasses.field(default_factory=list)
    high: list[float] = dataclasses.field(default_factory=list)

    @property
    def last(self) -> str:
        """The last value, with how far the seeds lie apart."""
        return f"{self.bits[-1]:.3f}" + (f" ({self.low[-1]:.3f}–{self.high[-1]:.3f})" if self.seeds > 1 else "")


def choose(models: list[str] | None, params: int) -> dict[str, Config]:
    """The matched configs by name; raises InputError where a name is unknown."""
    for name in models or ():
        if name not in FAMILIES:
            raise InputError(f"models: {name!r} is unknown; {nearest(name, FAMILIES)}")
    return {name: config for name, config in match(params, 256).items() if not models or name in models}


def plan(
    name: str,
    config: Config,
    out: Path,
    corpus: str,
    steps: int,
    batch_size: int,
    seq_len: int,
    lr: float,
    backend: str | None,
    seed: int = 0,
) -> TrainConfig:
    """The run of one model with one seed.

    Evaluation starts anew after `seq_len` tokens, as training does: none is asked for what it never saw.
    """
    base = FAMILIES[name].base
    default = preset(base).to_dict()
    overrides: dict[str, Any] = {field: value for field, value in config.to_dict().items() if value != default[field]}
    every = max(1, math.ceil(steps / EVALUATIONS))
    return TrainConfig(
        model=ModelChoice(base, overrides),
        data=DataChoice(corpus=corpus, eval_window=seq_len),
        optimizer=Optimizer(lr=lr),
        schedule=Schedule(warmup_steps=max(1, steps // 20)),
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        eval_every=every,
        checkpoint_every=every,
        keep=1,
        backend=backend,  # pyright: ignore[reportArgumentType]
        seed=seed,
        out=str(out / ("".join(c if c.isalnum() else "-" for c in name) + (f"-seed-{seed}" if seed else ""))),
    )


def learn(runs: dict[str, list[TrainConfig]], text: Corpus, jobs: int, console: Console) -> list[Curve]:
    """Train each model with each seed, `jobs` runs at once, or continue what an earlier call began."""
    if jobs > 1:
        for run in pool([run for each in runs.values() for run in each], jobs):
            console.print(f"{run.folder.name} has ended")
    curves = []
    for name, each in runs.items():
        console.print(f"[bold]{name}[/]")
        for run in each:  # those that are whole return at once, and what failed in a process of its own says why
            obey(train(run, text).signal)
        curves.append(curve(name, each))
    return curves


def curve(name: str, runs: list[TrainConfig]) -> Curve:
    """What the logs of one model's runs say."""
    logs = [read_log(run.folder / LOG) for run in runs]
    scored = [[row for row in rows if "validation_bits" in row] for rows in logs]
    speeds = [row["rate"] for rows in logs for row in rows if row.get("rate")]
    bits = np.array([[row["validation_bits"] for row in rows] for rows in scored])  # [seeds, evaluations]
    return Curve(
        name,
        runs[0].backend or default_backend(),
        count_params(runs[0].model.config()),
        [row["step"] * runs[0].batch_size * runs[0].seq_len for row in scored[0]],
        bits.mean(0).tolist(),
        float(np.median(speeds)) if speeds else math.nan,
        len(runs),
        bits.min(0).tolist(),
        bits.max(0).tolist(),
    )


def dependencies(runs: dict[str, TrainConfig], out: Path) -> Path:
    """What each trained model's outputs depend on, in one figure."""
    matrices = {name: dependency_matrix(unisono_spec.load(model_file(run.folder)), TOKENS) for name, run in runs.items()}
    return figures.dependencies(out / "dependency.png", matrices, "What each output depends on, after training")


def report(curves: list[Curve], text: Corpus, out: Path, budget: str, run: dict[str, Any], console: Console) -> Path:
    """The table, best first; the figure; and both as numbers in compare.json. run: the command, date, device, versions, seeds, commit."""
    order = sorted(curves, key=lambda curve: curve.bits[-1])
    bits = ngrams.witten_bell(np.asarray(text.train), np.asarray(text.validation))
    # a context of three bytes and the byte that follows are a 4-gram
    baselines = {f"{n + 1}-gram": bits[n] for n in ORDERS}
    table = Table("model", "parameters", "bits a byte", "tokens/s", title=budget, title_justify="left")
    for i in (1, 2, 3):
        table.columns[i].justify = "right"
    for curve in order:
        table.add_row(curve.model, f"{curve.parameters:,}", curve.last, f"{curve.speed:,.0f}")
    for name, value in baselines.items():
        table.add_row(f"{name}, Witten–Bell", "", f"{value:.3f}", "")
    console.print(table)
    content = {"run": run, "budget": budget, "baselines": baselines, "curves": [dataclasses.asdict(curve) for curve in order]}
    write_bytes(out / "compare.json", json.dumps(content, indent=1).encode())
    return plot(content, out / "compare.png")


def plot(content: dict[str, Any], path: Path) -> Path:
    """The figure of a compare.json."""
    curves = [Curve(**values) for values in content["curves"]]
    lines = {f"{c.model}  {c.bits[-1]:.2f}": (c.tokens, c.bits, c.low, c.high) for c in curves}
    return figures.curves(path, lines, content["baselines"], "training tokens", "validation, bits a byte", content["budget"])
