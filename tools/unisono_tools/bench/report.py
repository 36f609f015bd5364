"""A run's figures as JSON, Markdown and a plot."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

from unisono_spec.contract.errors import shown

COLUMNS = ("contestant", "forward ms", "× ours", "of floor", "backward ms", "× ours", "of floor", "error ξ", "error ∂x", "peak MiB")


def about(command: str, device: str, *packages: str) -> dict[str, str]:
    """What a file of results says of the run that made it: the command, the date, the device, versions of what is installed."""
    versions = [f"Python {platform.python_version()}"]
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name).partition('+')[0]}")
    if not device.startswith("NVIDIA"):
        device += f" of {_processor()}"
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "versions": ", ".join(versions),
    }


def ready(parser: argparse.ArgumentParser, output: pathlib.Path | None) -> None:
    """Ends the command, before its work, where nothing could be written to `output`."""
    if output is None:
        return
    if not output.name or "\0" in str(output):
        parser.error(f"--output: {shown(str(output))} names no file; give a path without extension, as docs/results/NAME")
    try:
        folder = next(each for each in output.absolute().parents if each.exists())
        there = [path for path in (output.with_suffix(suffix) for suffix in (".json", ".md", ".png")) if path.exists()]
    except OSError as error:
        parser.error(f"--output: {shown(str(output))} cannot be a file's name ({error.strerror}); choose another")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"--output: {output} cannot be written, for {folder} is no folder that can be; choose another")
    for path in there:
        if not (path.is_file() and os.access(path, os.W_OK)):
            parser.error(f"--output: {path} stands there and cannot be written over; choose another name")


def keep(output: pathlib.Path | None, result: dict[str, Any], text: str) -> None:
    """OUTPUT.json and OUTPUT.md, if there is an output: after each part of a long run, so that one which is cut leaves what it has."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(text, encoding="utf-8")


def marks(rows: Iterable[tuple[str, float, float, float | None]], form: str = ".2f") -> list[str]:
    """Lines of a table from (what, measured, must, aim): a must above its aim is a ceiling, others are floors."""
    lines = ["| mark | must | aim | measured | met |", "|---|---|---|---|---|"]
    for what, measured, must, aim in rows:
        ceiling = aim is not None and aim < must
        sign = "≤" if ceiling else "≥"
        both = [(name, mark) for name, mark in (("must", must), ("aim", aim)) if mark is not None]
        met = [name for name, mark in both if (measured <= mark if ceiling else measured >= mark)]
        aimed = "–" if aim is None else f"{sign} {aim:g}"
        lines.append(f"| {what} | {sign} {must:g} | {aimed} | {measured:{form}} | {' and '.join(met) or 'no'} |")
    return lines


def _processor() -> str:
    """Its name where Linux tells it, else the kind."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def markdown(result: dict[str, Any]) -> str:
    """One table a case. Ratios are a peer's time over ours; shares are the floor's time over the contestant's."""
    lines = ["# Kernel benchmark", ""]
    lines += [f"- {name}: {value}" for name, value in result["run"].items()]
    rate, flops = result["ceilings"]["copy_bytes_per_s"], result["ceilings"]["matmul_flop_per_s"]
    lines += [f"- measured ceilings: copy {rate / 1e9:.0f} GB/s (read plus written), bf16 matmul {flops / 1e12:.1f} TFLOP/s"]
    lines += ["- floor: the fewest bytes that must move, at that copy rate; errors: ‖a − exact‖ / ‖exact‖ against float64", ""]
    for case in result["cases"]:
        lines += [f"## {case['name']}", ""]
        lines += [f"Floor: forward {case['floor_ms'][0]:.3f} ms, backward {case['floor_ms'][1]:.3f} ms.", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for row in case["rows"]:
            cells = [row["contestant"]]
            for way, floor in zip(("forward", "backward"), case["floor_ms"], strict=True):
                ms = row[f"{way}_ms"]
                cells += [_number(ms, ".3f"), _number(ms / case["rows"][0][f"{way}_ms"], ".2f"), _number(floor / ms, ".0%")]
            peak = row["peak_bytes"]
            cells += [_number(row["error_xi"], ".1e"), _number(row["error_dx"], ".1e"), _number(peak and peak / 2**20, ".0f")]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"{row['contestant']}: {row['note']}." for row in case["rows"] if row["note"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Share of the floor of every contestant: a row a case, a panel a direction."""
    from unisono_tools.experiments import figures

    cases = result["cases"]
    names = list(dict.fromkeys(row["contestant"] for case in cases for row in case["rows"]))
    with figures.panels(path, 2, 11, 1.6 + 0.3 * len(cases), sharey=True) as panels:
        for way, (axes, title) in enumerate(zip(panels, ("forward", "backward"), strict=True)):
            for number, name in enumerate(names):
                points = [
                    (100 * case["floor_ms"][way] / row[f"{title}_ms"], at)
                    for at, case in enumerate(cases)
                    for row in case["rows"]
                    if row["contestant"] == name and math.isfinite(row[f"{title}_ms"])
                ]
                size = 8 if name == names[0] else 5.5
                axes.plot(*zip(*points, strict=True), **figures.look(name, number), linestyle="", markersize=size, label=name)
            axes.axvline(100, color=figures.GREY, linewidth=1.2, linestyle="--")
            axes.annotate(
                "floor", (100, 1), (-3, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="right", fontsize=8
            )
            axes.set(title=title, xlabel="the floor's time, of the contestant's, %", xlim=(0, 103))
        panels[0].set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=8)
        panels[0].invert_yaxis()
        panels[0].figure.suptitle(f"{result['run']['device']}, {result['run']['date']}", fontsize=10, color=figures.GREY)
        figures.legend_below(panels[0], len(names))


def write(result: dict[str, Any], stem: pathlib.Path) -> None:
    """`stem`.json, .md and .png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    plot(result, stem.with_suffix(".png"))
