"""What a model costs on a GPU as its sequence grows: `python -m unisono_tools.bench.lengths --output docs/results/lengths-h200`

The CRAM paper's table 2 and figure 5: two layers, D = 512, one sequence, bfloat16. A training step (the loss and its gradient) of 1K to 64K
tokens, and reading alone, without what a gradient needs, to a million; both fitted by powers of the length. Each model in a process of its
own (workers.py): all compile at once, then each is timed while the others wait.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unisono_torch
from unisono_spec.contract import Config, InputError, preset

from unisono_tools.bench import report, workers

SHAPE: dict[str, Any] = {"d_model": 512, "n_layers": 2}
HEADS = {"head_width": 64}
MODELS: dict[str, Config] = {
    "cram (fixed)": preset("cram-demo", **SHAPE),
    "cram (adaptive)": preset("cram-1m", **SHAPE),
    "cram-plus": preset("cram-plus", **SHAPE),
    "lat": preset("lat-1m", **SHAPE, **HEADS),
    "based, taylor2": preset("based-1m", **SHAPE, **HEADS, attention="linear"),
    "infinityformer": preset("infinityformer-1m", **SHAPE, n_heads=8, d_ffn=2048, dropout=0.0),
    "mamba": preset("mamba-1m", **SHAPE),
    "maru": preset("maru-1m", **SHAPE),
    "s4d": preset("s4d-1m", **SHAPE),
    "transformer": preset("transformer-1m", **SHAPE, **HEADS),
}
LONGEST = {"training": 1 << 16, "reading": 1 << 20}
FITTED = {"training": 1 << 14, "reading": 1 << 16}  # from here on: below it, launches are seen
SHORTEST = 1024
SLOW = 2.0  # seconds of a call that is not repeated more often than once
PATIENCE = 8.0  # seconds of a call after which no longer ones are tried
Row = dict[str, Any]


def contest(name: str, repeats: int, turn: workers.Turn) -> list[Row]:
    """All points of a model; `turn` is called once its kernels are compiled."""
    return list(measure(name, repeats, turn))


def measure(name: str, repeats: int, turn: workers.Turn) -> Iterator[Row]:
    """Points of one model: seconds (the median) and MiB beyond what is held before, from short to long, until memory or PATIENCE ends.

    Yields what ended a kind, too, so that a table can say it.
    """
    model: Any = unisono_torch.create(MODELS[name], dtype="bfloat16", device="cuda")

    def read(tokens: torch.Tensor) -> None:
        with torch.no_grad():
            model(tokens)

    def train(tokens: torch.Tensor) -> None:
        model(tokens)[0].float().square().mean().backward()

    calls = {"training": train, "reading": read}
    for call in calls.values():
        call(_tokens(SHORTEST))
    model.zero_grad()
    torch.cuda.synchronize()
    turn()
    for kind, call in calls.items():
        length = SHORTEST
        while length <= LONGEST[kind]:
            row = {"model": name, "kind": kind, "length": length}
            try:
                torch.cuda.empty_cache()
                seconds, mebibytes = _timed(call, _tokens(length), repeats)
            except (RuntimeError, InputError) as error:
                memory = isinstance(error, torch.OutOfMemoryError)
                yield {**row, "ended": "out of memory" if memory else (str(error).splitlines() or [type(error).__name__])[0]}
                break
            finally:
                model.zero_grad()
            yield {**row, "seconds": seconds, "peak": mebibytes}
            if seconds > PATIENCE:
                if length < LONGEST[kind]:
                    yield {**row, "length": 2 * length, "ended": f"a call of {length:,} tokens takes {seconds:.1f} s"}
                break
            length *= 2


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0)).cuda()


def _timed(call: Callable[[torch.Tensor], object], tokens: torch.Tensor, repeats: int) -> tuple[float, float]:
    def once() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call(tokens)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    once()  # which compiles and allocates
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = once()
    peak = (torch.cuda.max_memory_allocated() - held) / (1 << 20)
    return statistics.median([first, *(once() for _ in range(0 if first > SLOW else repeats - 1))]), peak


def exponents(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """By model and kind, p of the power Tᵖ that fits time and memory best from FITTED tokens on (least squares of logarithms)."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        for kind, start in FITTED.items():
            mine = [r for r in rows if (r["model"], r["kind"]) == (name, kind) and r["length"] >= start and "seconds" in r]
            if len(mine) < 2:
                continue
            x = np.log([r["length"] for r in mine])
            fitted = {what: float(np.polyfit(x, np.log([r[what] for r in mine]), 1)[0]) for what in ("seconds", "peak")}
            out.setdefault(name, {})[kind] = fitted
    return out


def markdown(content: dict[str, Any]) -> str:
    rows, fitted = content["rows"], exponents(content["rows"])
    lines = ["# Cost against length on a GPU", "", *(f"- {name}: {value}" for name, value in content["run"].items()), ""]
    lines += [
        "Two layers, D = 512, one sequence, bfloat16. Exponents p of Tᵖ, 1 is linear: of a training step (forward, loss, backward)",
        "from 16K to 64K tokens, of reading alone from 64K to a million; below, and where times hardly grow, launches are seen. Memory is",
        "what a call takes beyond parameters.",
        "",
    ]
    lines += ["| model | training time | memory | reading time | memory |", "|---" * 5 + "|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = [
            f"{value:.2f}" if (value := fitted.get(name, {}).get(kind, {}).get(what)) is not None else "–"
            for kind in FITTED
            for what in ("seconds", "peak")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for kind in FITTED:
        lengths = sorted({row["length"] for row in rows if row["kind"] == kind})
        lines += ["", f"{kind.capitalize()}, milliseconds (MiB), by tokens:", ""]
        lines += [f"| model | {' | '.join(f'{n // 1024:,}K' for n in lengths)} |", "|---" * (len(lengths) + 1) + "|"]
        for name in dict.fromkeys(row["model"] for row in rows):
            found = {row["length"]: row for row in rows if (row["model"], row["kind"]) == (name, kind)}
            lines.append(f"| {name} | {' | '.join(_cell(found.get(n)) for n in lengths)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"not run: {row['ended']}" if "ended" in row else f"{1e3 * row['seconds']:,.2f} ({row['peak']:,.0f})"


def plot(path: Path, content: dict[str, Any]) -> None:
    """Time and memory against length, with the slopes of what is linear and what is quadratic."""
    from unisono_tools.experiments import figures

    panels_of = [(kind, what) for kind in FITTED for what in ("seconds", "peak")]
    with figures.panels(path, len(panels_of), 15, 5.0) as panels:
        for axes, (kind, what) in zip(panels, panels_of, strict=True):
            rows = [row for row in content["rows"] if row["kind"] == kind and "seconds" in row]
            for i, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
                mine = [row for row in rows if row["model"] == name]
                axes.plot([r["length"] for r in mine], [r[what] for r in mine], **figures.look(name, i), markersize=4, label=name)
            lengths = sorted({row["length"] for row in rows})
            limits = axes.get_ylim()
            start = max(row[what] for row in rows if row["length"] == lengths[0])
            for power, dash in ((1, "--"), (2, ":")):
                guide = [2 * start * (n / lengths[0]) ** power for n in lengths]
                axes.plot(lengths, guide, dash, color=figures.GREY, linewidth=1.2, label=f"slope {power}")
            axes.set(xscale="log", yscale="log", title=f"{kind}, {'s' if what == 'seconds' else 'MiB'}", xlabel="tokens")
            axes.set_ylim(top=4 * limits[1])
            axes.set_xticks(lengths[::2], [f"{n // 1024}K" for n in lengths[::2]])
            axes.minorticks_off()
        figures.legend_below(panels[0], 6)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.lengths", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json, .md and .png are added")
    parser.add_argument("--models", nargs="*", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds that all may compile, and then each be timed; 0: one by one")
    parser.add_argument("--resume", action="store_true", help="leave models as they are whose rows OUTPUT.json has")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    if not torch.cuda.is_available():
        parser.error("no GPU is seen; bench.linear measures a CPU")
    if options.resume and not options.output:
        parser.error("--resume goes on with a file; name it by --output")
    run = report.about(
        f"python -m unisono_tools.bench.lengths --repeats {options.repeats}", torch.cuda.get_device_name(), "torch", "triton"
    )
    content: dict[str, Any] = {"run": run, "rows": []}
    if options.resume and options.output.with_suffix(".json").is_file():
        old = json.loads(options.output.with_suffix(".json").read_text("utf-8"))
        content["rows"] = old["rows"]
        content["run"] = {name: "; ".join(dict.fromkeys((old["run"][name], value))) for name, value in run.items()}
    there = {row["model"] for row in content["rows"] if "seconds" in row}
    tasks = [(name, options.repeats) for name in options.models if name not in there]
    for (name, _), found in workers.rows(contest, tasks, options.patience):
        rows = failed(name, found) if isinstance(found, str) else found
        for row in rows:
            print(f"{name:<16} {row['kind']} {row['length']:>8}  {_cell(row)}", flush=True)
        content["rows"] = ordered([row for row in content["rows"] if row["model"] != name] + rows)
        report.keep(options.output, content, markdown(content))  # a run that is cut short has told something
    print(markdown(content))
    if options.output:
        plot(options.output.with_suffix(".png"), content)
    return 0


def failed(name: str, why: str) -> list[Row]:
    """What a table says of a model that ended its process, or was not ready."""
    return [{"model": name, "kind": kind, "length": SHORTEST, "ended": why} for kind in FITTED]


def ordered(rows: list[Row]) -> list[Row]:
    """By model, as MODELS has them."""
    return sorted(rows, key=lambda row: list(MODELS).index(row["model"]))


if __name__ == "__main__":
    sys.exit(main())
