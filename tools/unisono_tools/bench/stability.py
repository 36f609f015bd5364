"""Spikes of runs: the largest loss of a step over the running loss before it.

    python -m unisono_tools.bench.stability RUN … --output docs/results/stability      # runs that logged every step

The running loss is a mean of the losses so far that forgets with decay 0.98; a spike is a loss above twice it.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from typing import Any

from unisono_spec.contract import InputError

from unisono_tools.bench.report import about, ready
from unisono_tools.cli import guarded
from unisono_tools.reading import read_yaml
from unisono_tools.train.logs import NAME, read

DECAY, SPIKE = 0.98, 2.0


def spikes(losses: list[float]) -> tuple[float, int]:
    """The largest loss ÷ the running loss before it, and the number of that step, from 1."""
    running, worst = losses[0], (0.0, 0)
    for i, loss in enumerate(losses[1:], 2):
        ratio = loss / running if math.isfinite(loss) else math.inf
        worst = max(worst, (ratio, i))
        running = DECAY * running + (1 - DECAY) * loss
    return worst


def judged(run: pathlib.Path) -> dict[str, Any]:
    """What a run's log says. InputError unless it holds every step from the first."""
    rows = [row for row in read(run / NAME) if "loss" in row]
    if len(rows) < 2 or [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise InputError(f"{run / NAME}: does not hold every step from 1 on; train with --log_every 1")
    config = read_yaml(run / "config.yaml")
    ratio, step = spikes([row["loss"] for row in rows])
    return {
        "model": config["model"]["preset"],
        "lr": config["optimizer"]["lr"],
        "seed": config["seed"],
        "steps": len(rows),
        "ratio": ratio,
        "at": step,
        "norm": max(row["gradient_norm"] for row in rows if "gradient_norm" in row),
        "last": rows[-1]["loss"],
        "stable": ratio <= SPIKE,
    }


def markdown(run: dict[str, str], rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Spikes in training",
        "",
        "The largest loss of a step over the running loss before it (a mean with decay 0.98); a spike would be above 2.",
        "",
        *(f"- {name}: {value}" for name, value in run.items()),
        "",
        "| model | lr | seed | steps | largest loss ÷ running loss | at step | largest gradient norm | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], f"{row['lr']:g}", row["seed"], f"{row['steps']:,}", f"{row['ratio']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['at']:,} | {row['norm']:.1f} | {row['last']:.3f} |")
    return "\n".join([*lines, "", "No spike." if all(row["stable"] for row in rows) else "There are spikes."]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.stability", description="Look for spikes in the logs of runs.")
    parser.add_argument("runs", type=pathlib.Path, nargs="+")
    parser.add_argument("--command", default="", help="what trained them, for the file of results")
    parser.add_argument("--device", default="", help="what they were trained on, likewise")
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added")
    options = parser.parse_args(argv)
    ready(parser, options.output)
    rows = [judged(run) for run in options.runs]
    run = about(options.command, options.device, "unisono", "torch", "triton", "jax")
    print(markdown(run, rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(run, rows), encoding="utf-8")
    return 0 if all(row["stable"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(guarded("stability", main))
