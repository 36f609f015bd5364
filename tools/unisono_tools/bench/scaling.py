"""How tokens a second grow with the number of devices: runs one after the other in the same processes, which start once.

    python -m unisono_tools.bench.scaling --output scaling
    torchrun --nproc-per-node 2 -m unisono_tools.bench.scaling --output scaling
    python -m unisono_tools.bench.scaling --backend jax --devices 1 2 --output scaling

Each number of devices reads one device's batch together, and one each; several do so under each layout of `--with`, and one under what of
it means something there. Rates are those of `bench.loop`'s `pace`: the training loop, without evaluations and checkpoints. The table's
ratio is to one device that reads as much as each: 200 % would be perfect for two.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from unisono_tools.backends import backend
from unisono_tools.bench.loop import changes, pace, plan, without_output
from unisono_tools.bench.report import about, ready
from unisono_tools.config import TrainConfig, processes


def runs(options: argparse.Namespace) -> Iterator[tuple[str, TrainConfig]]:
    """What this start of the benchmark measures: a layout's options as text, and a run."""
    started, size = processes()[1], options.batch_size
    for number in [started] if started > 1 else options.devices if options.backend == "jax" else [1]:
        # one device also reads what each of several does
        batches = [size, size // max(options.devices)] if number == 1 else [size * number, size]
        for text in options.layouts if number > 1 else dict.fromkeys(map(alone, options.layouts)):
            for batch in batches:
                yield text, plan(options, devices=number, batch_size=batch, **changes(text))


def alone(layout: str) -> str:
    """What of a layout's options means something on one device."""
    return ",".join(pair for pair in layout.split(",") if pair.partition("=")[0] not in ("parallel", "context", "accumulation"))


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
    parser.add_argument(
        "--with",
        dest="layouts",
        nargs="*",
        default=["parallel=ddp", "parallel=fsdp"],
        help="how several devices share the work, as in parallel=fsdp context=2,accumulation=4",
    )
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added, rows appended")
    options = parser.parse_args(argv)
    ready(parser, options.output)
    if options.steps % 10:
        parser.error(f"--steps {options.steps}: use a multiple of 10, since every tenth step is logged")
    words = sys.argv[1:] if argv is None else argv
    first, number = processes()[0] == 0, processes()[1]
    launch = f"torchrun --nproc-per-node {number} -m" if number > 1 else "python -m"
    run = about(
        f"{launch} unisono_tools.bench.scaling {' '.join(without_output(words))}",
        backend(options.backend).device_name(options.device),
        "unisono",
        options.backend,
    )
    stored = options.output.with_suffix(".json") if options.output else None
    before = json.loads(stored.read_text()) if stored and stored.is_file() else []
    rows: list[dict[str, Any]] = []
    for text, config in runs(options):
        about_it = {"backend": options.backend, "model": options.model, "dtype": config.dtype, "seq_len": config.seq_len}
        layout = {"devices": config.devices, "with": text, "batch_size": config.batch_size}
        rate, loss = pace(config)
        rows.append({**about_it, **layout, "tokens_per_s": rate, "loss": loss})
        if first:
            print(rows[-1], flush=True)
            if options.output:
                write([*before, {"run": run, "rows": rows}], options.output)
    if number > 1 and options.backend == "torch":
        backend("torch").leave(0)
    return 0


def write(found: list[dict[str, Any]], stem: pathlib.Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [(call, row) for call, one in enumerate(found, 1) for row in one["rows"]]
    lines = [
        "# How training scales with devices",
        "",
        "Tokens a second in training (`bench/scaling.py` says of what). The last column compares with one device that reads as much as",
        "each of these does, and says in which of the calls that was: N devices make N × 100 % at best.",
        "",
    ]
    for call, one in enumerate(found, 1):
        lines += [f"Call {call}:", "", *(f"- {name}: {value}" for name, value in one["run"].items()), ""]
    lines += [
        "| call | backend | model | dtype | devices | with | batch a device | tokens/s | one device with as much |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for call, row in rows:
        each = row["batch_size"] / row["devices"]
        what = f"{call} | {row['backend']} | {row['model']} | {row['dtype']} | {row['devices']} | {row['with']}"
        lines.append(f"| {what} | {each:g} × {row['seq_len']} | {row['tokens_per_s']:,.0f} | {_ratio(row, rows)} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _ratio(row: dict[str, Any], rows: list[tuple[int, dict[str, Any]]]) -> str:
    """To the last measured one device that does the same with as much."""
    same = ("backend", "model", "dtype", "seq_len")
    wanted = (alone(row["with"]), row["batch_size"] / row["devices"], *(row[name] for name in same))
    for call, other in reversed(rows) if row["devices"] > 1 else ():
        if other["devices"] == 1 and (other["with"], other["batch_size"], *(other[name] for name in same)) == wanted:
            return f"{row['tokens_per_s'] / other['tokens_per_s']:.0%} of call {call}"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
