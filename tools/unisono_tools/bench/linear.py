"""What a model costs as its sequence grows: `python -m unisono_tools.bench.linear --output docs/results/linear-cpu`

Each point is a process of its own (PyTorch, CPU, one layer, D = 64, one sequence), so that its peak memory is its own. Time is fitted by
a power of the length, and so is the memory beyond what the process held before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import Config, InputError, preset

from unisono_tools.bench.report import about

LENGTHS = tuple(2**k for k in range(10, 16))  # 1K … 32K
FITTED = 4096  # from here on: below it, fixed costs are seen
SHORT: dict[str, Any] = {"d_model": 64, "n_layers": 1}
MODELS: dict[str, Config] = {
    "cram (fixed)": preset("cram-demo", **SHORT),
    "cram (adaptive)": preset("cram-1m", **SHORT),
    "lat": preset("lat-1m", **SHORT),
    "based, taylor2": preset("based-1m", **SHORT, attention="linear"),
    "infinityformer": preset("infinityformer-1m", **SHORT, n_heads=2, d_ffn=256, dropout=0.0),
    "mamba": preset("mamba-1m", **SHORT),
    "maru": preset("maru-1m", **SHORT),
    "s4d": preset("s4d-1m", **SHORT),
    "transformer": preset("transformer-1m", **SHORT),
}
KINDS = {"forward": "s", "backward": "s", "peak": "MiB"}


@dataclasses.dataclass(frozen=True)
class Point:
    """forward, backward: median seconds; peak: MiB that the process grew by."""

    model: str
    length: int
    forward: float
    backward: float
    peak: float


def measure(name: str, length: int, repeats: int) -> Point:
    """One point, in this process."""
    import torch
    import unisono_torch

    torch.set_num_threads(1)
    model: Any = unisono_torch.create(MODELS[name])
    tokens = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :128])[0].sum().backward()
    before, forward, backward = _peak(), [], []
    for _ in range(repeats):
        start = time.perf_counter()
        logits, _ = model(tokens)
        middle = time.perf_counter()
        logits.square().mean().backward()
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return Point(name, length, statistics.median(forward), statistics.median(backward), _peak() - before)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)


def exponents(points: list[Point]) -> dict[str, dict[str, float]]:
    """By model and kind, p of the power Tᵖ that fits best from FITTED tokens on (least squares of logarithms)."""
    out: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(point.model for point in points):
        mine = [point for point in points if point.model == name and point.length >= FITTED]
        x = np.log([point.length for point in mine])
        out[name] = {kind: float(np.polyfit(x, np.log([max(getattr(p, kind), 1e-9) for p in mine]), 1)[0]) for kind in KINDS}
    return out


def markdown(run: dict[str, str], points: list[Point]) -> str:
    fitted = exponents(points)
    lines = ["# Cost against length", "", *(f"- {name}: {value}" for name, value in run.items()), ""]
    lines += [
        "One layer, D = 64, one sequence, float32. Exponents p of Tᵖ, fitted from 4K to 32K tokens; 1 is linear. Then milliseconds of",
        "forward and backward, and MiB, at 32K.",
        "",
    ]
    lines += ["| model | forward | backward | memory | forward, ms | backward, ms | peak, MiB |", "|---" * 7 + "|"]
    for name, found in fitted.items():
        last = max((p for p in points if p.model == name), key=lambda p: p.length)
        powers = " | ".join(f"{found[kind]:.2f}" for kind in KINDS)
        lines.append(f"| {name} | {powers} | {1e3 * last.forward:.0f} | {1e3 * last.backward:.0f} | {last.peak:.0f} |")
    lengths = sorted({point.length for point in points})
    lines += ["", "Milliseconds of both ways, by tokens:", "", f"| model | {' | '.join(f'{n:,}' for n in lengths)} |"]
    lines += ["|---" * (len(lengths) + 1) + "|"]
    for name in fitted:
        both = {p.length: f"{1e3 * (p.forward + p.backward):,.0f}" for p in points if p.model == name}
        lines.append(f"| {name} | {' | '.join(both.get(n, '–') for n in lengths)} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, points: list[Point]) -> None:
    """Time and memory against length, with the slopes of what is linear and what is quadratic."""
    from unisono_tools.experiments import figures

    with figures.panels(path, len(KINDS), 12, 5.0) as panels:
        for axes, (kind, unit) in zip(panels, KINDS.items(), strict=True):
            highest = 0.0
            for i, name in enumerate(dict.fromkeys(point.model for point in points)):
                mine = [p for p in points if p.model == name]
                y = [getattr(p, kind) for p in mine]
                highest = max(highest, y[0])
                axes.plot([p.length for p in mine], y, **figures.look(name, i), markersize=4.5, label=name)
            limits = axes.get_ylim()
            for power, dash in ((1, "--"), (2, ":")):
                # through one point above all curves' beginnings, so that they are seen
                guide = [2 * highest * (n / LENGTHS[0]) ** power for n in LENGTHS]
                axes.plot(LENGTHS, guide, dash, color=figures.GREY, linewidth=1.2, label=f"slope {power}")
            axes.set(xscale="log", yscale="log", title=f"{kind}, {unit}", xlabel="tokens")
            axes.set_ylim(top=4 * limits[1])
            axes.set_xticks(LENGTHS, [f"{n // 1024}K" for n in LENGTHS])
            axes.minorticks_off()
        figures.legend_below(panels[0], 6)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.linear", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json, .md and .png are added")
    parser.add_argument("--models", nargs="*", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--point", nargs=2, metavar=("MODEL", "LENGTH"), help="measure one point in this process")
    options = parser.parse_args(argv)
    if options.point:
        print(json.dumps(dataclasses.asdict(measure(options.point[0], int(options.point[1]), options.repeats))))
        return 0
    points = []
    for name in options.models:
        for length in LENGTHS:
            command = [sys.executable, "-m", "unisono_tools.bench.linear", "--repeats", str(options.repeats), "--point", name, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InputError(f"{name} at {length} tokens: {done.stderr.strip().splitlines()[-1]}")
            p = Point(**json.loads(done.stdout.splitlines()[-1]))
            points.append(p)
            print(f"{name:<16} {length:>6}  {1e3 * p.forward:9.1f} ms  {1e3 * p.backward:9.1f} ms  {p.peak:8.0f} MiB", flush=True)
    run = about(f"python -m unisono_tools.bench.linear --repeats {options.repeats}", "1 thread", "torch")
    print(markdown(run, points))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"run": run, "exponents": exponents(points), "points": [dataclasses.asdict(point) for point in points]}
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(run, points), encoding="utf-8")
        plot(options.output.with_suffix(".png"), points)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
