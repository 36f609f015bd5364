"""What a model costs as its sequence grows: `python -m unisono_tools.bench.linear --output docs/results/linear-cpu`

Each point is a process of its own (PyTorch, CPU, one sequence; one layer, D = 64, or `--params 1M`), so that its peak memory is its own.
Time is fitted by a power of the length, and so is the memory beyond what the process held before: of reading, without what a gradient
needs, and of forward and backward. `--beside N` measures N models at a time, each on a physical core of its own (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import Config, InputError, preset

from unisono_tools.bench.report import about, keep, ready
from unisono_tools.commands.match import number
from unisono_tools.experiments.match import FAMILIES, nearest

LENGTHS = tuple(2**k for k in range(10, 16))  # 1K … 32K
FITTED = 8  # from the longest over this on: below it, fixed costs are seen
BYTES = 256  # ids of a text
PATIENCE = 3600.0  # seconds
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
KINDS = {"reading": "s", "read": "MiB", "forward": "s", "backward": "s", "peak": "MiB"}
TITLES = {"read": "memory of reading", "peak": "peak"}
TOLD = [
    "Reading keeps nothing for a gradient; forward and backward are training's.",
    "Times are those that the thread computed, whoever else was at work.",
]


@dataclasses.dataclass(frozen=True)
class Point:
    """reading, forward, backward: median seconds that the one thread computed, whoever else is at work.

    reading keeps nothing for a gradient; read: MiB that the process grew by while it read; peak: in all.
    """

    model: str
    length: int
    forward: float
    backward: float
    peak: float
    reading: float | None = None
    read: float | None = None


def config_of(name: str, params: str) -> Config:
    """MODELS[name], or the model of `unisono match` with so many parameters."""
    if params:
        return nearest(name, number(params), BYTES)
    if name not in MODELS:
        raise InputError(f"models: {name!r} is none of {', '.join(MODELS)}; use one of them, or say --params")
    return MODELS[name]


def measure(name: str, length: int, repeats: int, params: str = "") -> Point:
    """One point, in this process."""
    import torch
    import unisono_torch

    torch.set_num_threads(1)
    model: Any = unisono_torch.create(config_of(name, params))
    tokens = torch.randint(0, BYTES, (1, length), generator=torch.Generator().manual_seed(0))
    reading, forward, backward = [], [], []
    with torch.no_grad():
        model(tokens[:, :128])
        before = forget_peak()
        for _ in range(repeats):
            start = time.process_time()
            model(tokens)
            reading.append(time.process_time() - start)
        read = peak_mebibytes() - before
    model(tokens[:, :128])[0].sum().backward()
    before = forget_peak()
    for _ in range(repeats):
        start = time.process_time()
        logits, _ = model(tokens)
        middle = time.process_time()
        logits.square().mean().backward()
        forward.append(middle - start)
        backward.append(time.process_time() - middle)
    middle = statistics.median
    return Point(name, length, middle(forward), middle(backward), peak_mebibytes() - before, middle(reading), read)


def peak_mebibytes() -> float:
    """The most that this process has held, since its peak was forgotten where it was."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)


def forget_peak() -> float:
    """What this process holds, in MiB, from which on its peak counts. Linux with glibc forgets; elsewhere it is the peak until now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_mebibytes()


def cores() -> list[int]:
    """Numbers of the physical cores that this process may use: of threads of one core, the first. Linux alone tells."""
    if not hasattr(os, "sched_getaffinity"):
        raise InputError(f"beside: {sys.platform} pins no process to a core; leave --beside out")
    found: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        told = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        found.setdefault(told.read_text(encoding="ascii").strip() if told.exists() else str(core), core)
    return list(found.values())


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed. One that the system has ended, for its memory, say, has said nothing."""
    return (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]


def kinds(points: list[Point]) -> list[str]:
    """What was measured of all of them."""
    return [kind for kind in KINDS if all(getattr(point, kind) is not None for point in points)]


def exponents(points: list[Point]) -> dict[str, dict[str, float]]:
    """By model and kind, p of the power Tᵖ that fits best (least squares of logarithms), from an eighth of the longest on."""
    return {name: {kind: float(np.polyfit(*logs, 1)[0]) for kind, logs in found.items()} for name, found in _logarithms(points).items()}


def spreads(points: list[Point]) -> dict[str, dict[str, tuple[float, float]]]:
    """... and the least and the greatest of the powers between one length and the next."""
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for name, found in _logarithms(points).items():
        slopes = {kind: np.diff(y) / np.diff(x) for kind, (x, y) in found.items()}
        out[name] = {kind: (float(each.min()), float(each.max())) for kind, each in slopes.items()}
    return out


def _logarithms(points: list[Point]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """By model and kind: of two lengths or more that are fitted, and of what was measured there. Memory of 0 fits no power."""
    out: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name, group in itertools.groupby(points, key=lambda point: point.model):
        mine = list(group)
        mine = [point for point in mine if point.length * FITTED >= mine[-1].length]
        found = {kind: [(p.length, getattr(p, kind)) for p in mine if getattr(p, kind) > 0] for kind in kinds(points)}
        logs = {kind: np.log(pairs).T for kind, pairs in found.items() if len(pairs) > 1}
        out |= {name: {kind: (x, y) for kind, (x, y) in logs.items()}} if logs else {}  # none yet of a call that was cut
    return out


def markdown(run: dict[str, str], points: list[Point]) -> str:
    fitted, apart, measured = exponents(points), spreads(points), kinds(points)
    longest, holes = max(point.length for point in points), any(len(found) < len(measured) for found in fitted.values())
    lines = ["# Cost against length", "", *(f"- {name}: {value}" for name, value in run.items()), ""]
    lines += [
        f"{run.get('models', 'One layer, D = 64')}, one sequence, float32. Exponents p of Tᵖ, fitted from an eighth of a model's longest",
        "on; 1 is linear; in brackets the least and the greatest between one length and the next.",
        *(["–: memory grew at fewer than two lengths beyond what the process had held before."] if holes else []),
        *(TOLD if "reading" in measured else []),
        "",
    ]
    names = [TITLES.get(kind, kind) for kind in measured]
    lines += [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, found in fitted.items():
        ranges = {kind: f" ({least:.2f}–{greatest:.2f})" for kind, (least, greatest) in apart[name].items()}
        powers = [f"{found[kind]:.2f}{ranges[kind]}" if kind in found else "–" for kind in measured]
        lines.append(f"| {name} | {' | '.join(powers)} |")
    heads = [f"{name}, {'ms' if KINDS[kind] == 's' else 'MiB'}" for name, kind in zip(names, measured, strict=True)]
    lines += ["", f"At {longest // 1024}K tokens, or the longest that was measured:", ""]
    lines += [f"| model | tokens | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for name in fitted:
        last = max((p for p in points if p.model == name), key=lambda p: p.length)
        cells = [f"{getattr(last, kind) * (1e3 if KINDS[kind] == 's' else 1):,.0f}" for kind in measured]
        lines.append(f"| {name} | {last.length:,} | {' | '.join(cells)} |")
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

    measured, lengths = kinds(points), sorted({point.length for point in points})
    with figures.panels(path, len(measured), 4 * len(measured), 5.0) as panels:
        for axes, kind in zip(panels, measured, strict=True):
            highest = 0.0
            for i, name in enumerate(dict.fromkeys(point.model for point in points)):
                mine = [p for p in points if p.model == name]
                y = [getattr(p, kind) for p in mine]
                highest = max(highest, y[0])
                axes.plot([p.length for p in mine], y, **figures.look(name, i), markersize=4.5, label=name)
            limits = axes.get_ylim()
            for power, dash in ((1, "--"), (2, ":")):
                # through one point above all curves' beginnings, so that they are seen
                guide = [2 * highest * (n / lengths[0]) ** power for n in lengths]
                axes.plot(lengths, guide, dash, color=figures.GREY, linewidth=1.2, label=f"slope {power}")
            axes.set(xscale="log", yscale="log", title=f"{TITLES.get(kind, kind)}, {KINDS[kind]}", xlabel="tokens")
            axes.set_ylim(top=4 * limits[1])
            axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
            axes.minorticks_off()
        figures.legend_below(panels[0], 6)


def _points(name: str, options: argparse.Namespace, core: int | None) -> Iterator[Point]:
    """One model's, by length: each from a process of its own, on the core if one is given."""
    for length in filter(lambda length: length <= options.longest, LENGTHS):
        command = [sys.executable, "-m", "unisono_tools.bench.linear", "--params", options.params, "--repeats", str(options.repeats)]
        command += ["--core", str(core)] if core is not None else []
        done = subprocess.run([*command, "--point", name, str(length)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{name} at {length} tokens: {reason(done)}")
        point = Point(**json.loads(done.stdout.splitlines()[-1]))
        yield point
        if point.forward + point.backward > options.patience and length > LENGTHS[0]:  # a power takes two points
            return


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.linear", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json, .md and .png are added")
    parser.add_argument("--models", nargs="*", choices=sorted({*MODELS, *FAMILIES}), help="all by default")
    parser.add_argument("--params", default="", help="parameters of each model, such as 1M; one layer, D = 64, by default")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds both ways after which no longer ones are tried")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beside", type=int, default=1, help="models at a time, each on a core of its own")
    parser.add_argument("--core", type=int, help="of --point: the core that this process stays on")
    parser.add_argument("--point", nargs=2, metavar=("MODEL", "LENGTH"), help="measure one point in this process")
    options = parser.parse_args(argv)
    ready(parser, options.output)
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    if options.point:
        print(json.dumps(dataclasses.asdict(measure(options.point[0], int(options.point[1]), options.repeats, options.params))))
        return 0
    if options.longest < LENGTHS[1]:
        parser.error(f"--longest {options.longest}: use {LENGTHS[1]} or more, since a power takes two lengths")
    free = cores() if options.beside > 1 else []
    if not 0 < options.beside <= max(len(free), 1):
        parser.error(f"--beside {options.beside}: use 1 to {len(cores())}, the physical cores that this process may use")
    load = f"{os.getloadavg()[0]:.1f} when it began"
    chosen = ["--params", options.params] if options.params else []
    given = [*chosen, *(["--models", *map(shlex.quote, options.models)] if options.models else [])]
    given += ["--longest", str(options.longest)] if options.longest != LENGTHS[-1] else []
    given += ["--patience", f"{options.patience:g}"] if options.patience != PATIENCE else []
    given += ["--beside", str(options.beside)] if free else []
    on = f"1 thread a model, on a core of its own, {options.beside} models at a time," if free else "1 thread"
    run = about(" ".join(["python -m unisono_tools.bench.linear", *given, f"--repeats {options.repeats}"]), on, "torch")
    run |= {"models": f"{options.params} parameters each"} if options.params else {}
    names, lock = list(options.models or (FAMILIES if options.params else MODELS)), threading.Lock()
    found: dict[str, list[Point]] = {name: [] for name in names}

    def kept() -> list[Point]:
        points = list(itertools.chain.from_iterable(found.values()))
        content = {"run": run, "exponents": exponents(points), "points": [dataclasses.asdict(point) for point in points]}
        keep(options.output, content, markdown(run, points))  # so that a call which is cut leaves what it has
        return points

    def curve(name: str) -> None:
        core = free.pop() if free else None  # there are as many as threads
        try:
            for p in _points(name, options, core):
                with lock:
                    found[name].append(p)
                    print(f"{name:<16} {p.length:>6}  {1e3 * p.forward:9.1f} ms  {1e3 * p.backward:9.1f} ms  {p.peak:8.0f} MiB", flush=True)
                    run["load"] = f"{load}, {os.getloadavg()[0]:.1f} when it ended"
                    kept()
        finally:
            free.extend([] if core is None else [core])

    with ThreadPoolExecutor(options.beside) as pool:
        list(pool.map(curve, names))
    points = kept()
    print(markdown(run, points))
    if options.output:
        plot(options.output.with_suffix(".png"), points)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
