"""How tokens a second grow with the number of devices: whole runs, one after the other in the same processes, which start once.

    python -m unisono_tools.bench.scaling --output scaling
    torchrun --nproc-per-node 2 -m unisono_tools.bench.scaling --output scaling
    python -m unisono_tools.bench.scaling --backend jax --devices 1 2 --output scaling

Each number of devices reads one device's batch together, and one each; with several, as copies of the parameters and as shards. Rates
are read off the runs' logs, as in `bench/loop.py`. The table's ratio is to one device that reads as much as each: 200 % would be perfect
for two.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from rich.console import Console

from unisono_tools.backends import backend
from unisono_tools.bench.loop import plan, rate_of
from unisono_tools.bench.report import about
from unisono_tools.config import TrainConfig, processes
from unisono_tools.train import train


def runs(options: argparse.Namespace) -> list[TrainConfig]:
    """What this start of the benchmark measures."""
    started, size = processes()[1], options.batch_size
    numbers = [started] if started > 1 else options.devices if options.backend == "jax" else [1]
    found = []
    for number in numbers:
        # one device also reads what each of several does
        batches = [size, size // max(options.devices)] if number == 1 else [size * number, size]
        for parallel in ("ddp", "fsdp") if number > 1 else ("ddp",):
            found += [plan(options, devices=number, parallel=parallel, batch_size=batch) for batch in batches]
    return found


def measure(config: TrainConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Tokens a second over all devices."""
    result = train(dataclasses.replace(config, out=str(folder)), console=Console(quiet=True))
    gc.collect()  # of what the next one needs the room
    # the first process writes the log
    rate, loss = rate_of(result.run, config) if processes()[0] == 0 else (0.0, 0.0)
    return {"tokens_per_s": rate, "loss": loss}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.scaling", description="Time runs on several devices.")
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch")
    parser.add_argument("--device", default=None)
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[1, 2], help="of jax; torchrun starts those of torch, or else one is used"
    )
    parser.add_argument("--model", default="cram-1m")
    parser.add_argument("--batch_size", type=int, default=16, help="of one device")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added, rows appended")
    options = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    first, number = processes()[0] == 0, processes()[1]
    launch = f"torchrun --nproc-per-node {number} -m" if number > 1 else "python -m"
    run = about(
        f"{launch} unisono_tools.bench.scaling {' '.join(words)}",
        backend(options.backend).device_name(options.device),
        "unisono",
        options.backend,
    )
    stored = options.output.with_suffix(".json") if options.output else None
    before = json.loads(stored.read_text()) if stored and stored.is_file() else []
    rows: list[dict[str, Any]] = []
    # the same place in all processes that one has started
    place = pathlib.Path(tempfile.gettempdir()) / f"unisono-scaling-{os.getppid()}-{os.getpid() if number == 1 else ''}"
    for i, config in enumerate(runs(options)):
        about_it = {"backend": options.backend, "model": options.model, "dtype": options.dtype, "seq_len": options.seq_len}
        layout = {"devices": config.devices, "parallel": config.parallel, "batch_size": config.batch_size}
        rows.append({**about_it, **layout, **measure(config, place / str(i))})
        if first:
            print(rows[-1], flush=True)
            if options.output:
                write([*before, {"run": run, "rows": rows}], options.output)
    if first:
        shutil.rmtree(place, ignore_errors=True)
    if number > 1 and options.backend == "torch":
        backend("torch").leave(0)
    return 0


def write(found: list[dict[str, Any]], stem: pathlib.Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [row for one in found for row in one["rows"]]
    lines = ["# How training scales with devices", "", "Tokens a second of whole runs (`bench/scaling.py` says of which).", ""]
    for one in found:
        lines += [*(f"- {name}: {value}" for name, value in one["run"].items()), ""]
    lines += [
        "| backend | model | dtype | devices | parallel | batch a device | tokens/s | one device with as much |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        each = row["batch_size"] / row["devices"]
        same = ("backend", "model", "dtype", "seq_len")
        alone = [r for r in rows if r["devices"] == 1 and r["batch_size"] == each and all(r[name] == row[name] for name in same)]
        ratio = f"{row['tokens_per_s'] / alone[-1]['tokens_per_s']:.0%}" if alone and row["devices"] > 1 else ""
        what = f"{row['backend']} | {row['model']} | {row['dtype']} | {row['devices']} | {row['parallel'] if row['devices'] > 1 else ''}"
        lines.append(f"| {what} | {each:g} × {row['seq_len']} | {row['tokens_per_s']:,.0f} | {ratio} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
