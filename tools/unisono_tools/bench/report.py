"""A run's figures as JSON, Markdown and a plot."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
from typing import Any

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
    """Share of the floor of every contestant, a panel a direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["contestant"] for case in result["cases"] for row in case["rows"]))
    cases = result["cases"]
    figure, panels = plt.subplots(1, 2, figsize=(13, 1.2 + 0.17 * len(cases) * (len(names) + 1)), sharey=True, layout="constrained")
    height = 0.85 / len(names)
    for way, panel in enumerate(panels):
        title = ("forward", "backward")[way]
        for index, name in enumerate(names):
            shares, places = [], []
            for position, case in enumerate(cases):
                for row in case["rows"]:
                    if row["contestant"] == name and math.isfinite(row[f"{title}_ms"]):
                        shares.append(100 * case["floor_ms"][way] / row[f"{title}_ms"])
                        places.append(position + (index - (len(names) - 1) / 2) * height)
            panel.barh(places, shares, height, label=name, color=f"C{index}")
        panel.set_title(title)
        panel.set_xlabel("share of the measured floor, %")
        panel.set_xlim(0, 105)
        panel.axvline(100, color="0.6", linewidth=0.8)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(cases)), [case["name"].replace(", ", "\n", 1) for case in cases], fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"{result['run']['device']}, {result['run']['date']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(result: dict[str, Any], stem: pathlib.Path) -> None:
    """`stem`.json, .md and .png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    plot(result, stem.with_suffix(".png"))
