"""What attention's kernels were to reach, and what was measured: `python -m unisono_tools.bench.marks docs/results`

Reads kernels-attention-h100.json and, if it is there, kernels-attention-lengths-h100.json; writes kernels-attention-marks-h100.md beside
them; and so of h200. What a page has no rows of is left out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Content = dict[str, Any]
WAYS = {"forward": "forward_ms", "both ways": "both_ms"}
JLA, SDPA = "jax-linear-attention", "causal SDPA"


@dataclasses.dataclass(frozen=True)
class Mark:
    """ratio: measured; it is to be at most `must` and `aim`, or with `least` at least; 1 stands for "ahead"."""

    what: str
    against: str
    ratio: float
    must: float
    aim: float | None
    least: bool
    figures: str

    def met(self, bound: float | None) -> str:
        if bound is None:
            return "–"
        reached = self.ratio >= bound if self.least else self.ratio <= bound
        return "yes" if reached else "**no**"


def memory(case: Content, row: Content) -> float:
    """Bytes at the peak of both ways over those of inputs and outputs: q, k, v, do, which are held, o and three gradients."""
    return (row["peak_bytes"] + case["held_bytes"] / 2) / case["held_bytes"]


def _row(case: Content, begins: str) -> Content:
    return next(row for row in case["rows"] if row["contestant"].startswith(begins))


def _has(case: Content | None, *begin: str) -> bool:
    return case is not None and all(any(row["contestant"].startswith(name) for row in case["rows"]) for name in ("unisono", *begin))


def found(attention: Content, lengths: Content | None) -> Iterator[Mark]:
    cases = {case["name"].removesuffix(", bfloat16"): case for case in attention["cases"]}

    def times(case: Content, peer: Content, way: str, must: float, aim: float, least: bool, what: str) -> Mark:
        row, its = _row(case, "unisono"), peer[WAYS[way]]
        ours, alone = row[WAYS[way]], row.get(f"kernels_{WAYS[way]}")
        gaps = ""
        if alone is not None and peer["contestant"].startswith(JLA):
            ours, gaps = alone, f"; {ours:.3f} by events"
        ratio = its / ours if least else ours / its
        slow = ", its host's time: both ways take it less" if its > peer["both_ms"] else ""
        return Mark(f"{what}, {way}", peer["contestant"], ratio, must, aim, least, f"{ours:.3f} for {its:.3f} ms{gaps}{slow}")

    for what, name, most in (
        ("linear attention with its normaliser", "B8 T4096 H16 K=V=64", 1.25),
        ("linear attention", "B8 T4096 H16 K=V=128", 1.3),
        ("linear attention", "B8 T1024 H16 K=V=64", 1.3),
        ("retention", "B8 T4096 H16 K=V=64, one decay", 1.25),
    ):
        for way in WAYS if _has(cases.get(name), JLA) else ():
            yield times(cases[name], _row(cases[name], JLA), way, most, 1.0, False, f"{what}, {name}")
    name = "B8 T4096 H16 K=V=64, 4 scales with gates"
    if _has(cases.get(name), JLA):
        yield times(cases[name], _row(cases[name], JLA), "both ways", 2, 3, True, f"S = 3 and the context path, {name}")
    name = "B8 T4096 H16 K=16 V=64, taylor2"
    if _has(cases.get(name), "fla"):
        best = min((row for row in cases[name]["rows"] if row["contestant"].startswith("fla")), key=lambda row: row["both_ms"])
        yield times(cases[name], best, "both ways", 3, 8, True, name)
    if lengths is not None:
        yield from _by_length(lengths)
    for what, most, several in (("linear attention", 1.3, False), ("one scale or several, taylor2", 1.6, True)):
        chosen = [case for case in attention["cases"] if (case["scales"] > 0 or case["feature_map"] == "taylor2") == several]
        of = {case["name"]: memory(case, _row(case, "unisono")) for case in chosen if _has(case)}
        if of:
            worst = max(of, key=of.__getitem__)
            yield Mark(f"peak memory, {what}", "inputs and outputs", of[worst], most, None, False, f"most at {worst}")


def _by_length(lengths: Content) -> Iterator[Mark]:
    at = next(case for case in lengths["cases"] if case["length"] == 4096)
    far = [case for case in lengths["cases"] if case["length"] >= 1024]
    for way, key in WAYS.items():
        device, eager = ([_row(case, SDPA)[name] / _row(case, "unisono")[name] for case in far] for name in (key, f"host_{key}"))
        figures = f"{', '.join(f'{ratio:.2f}' for ratio in device)}; eager {', '.join(f'{ratio:.2f}' for ratio in eager)}"
        yield Mark(f"linear attention, K = 64, T from 1,024, {way}, device time", SDPA, min(device), 1, None, True, figures)
        ours, its = _row(at, "unisono"), _row(at, SDPA)
        figures = f"{ours[key]:.3f} for {its[key]:.3f} ms; eager {ours[f'host_{key}']:.3f} for {its[f'host_{key}']:.3f}"
        yield Mark(f"… T = 4,096, {way}, device time", SDPA, its[key] / ours[key], 2.5, 4.7, True, figures)


def markdown(gpu: str, attention: Content, lengths: Content | None) -> str:
    """gpu: as names of pages have it, h100."""
    lines = ["# Attention's kernels: what they were to reach", ""]
    lines += ["Made by `python -m unisono_tools.bench.marks docs/results` from the figures of", ""]
    for name, content in ((f"kernels-attention-{gpu}", attention), (f"kernels-attention-lengths-{gpu}", lengths)):
        if content is not None:
            run = content["run"]
            lines += [f"- [{name}]({name}.md): {run['device']}, {run['date']}"]
    lines += ["", "≤: our time over the peer's (memory: bytes over those of inputs and outputs). ≥: the peer's time over ours."]
    if any("kernels_forward_ms" in row for case in attention["cases"] for row in case["rows"]):
        lines += ["Beside jax-linear-attention both times are those of kernels alone, as CUPTI records them."]
    lines += [""]
    lines += ["| what | beside | must | aim | measured | must met | aim met | figures |", "|---" * 8 + "|"]
    for mark in found(attention, lengths):
        sign = "≥" if mark.least else "≤"
        aim = "–" if mark.aim is None else f"{sign} {mark.aim:g}"
        met = f"{mark.met(mark.must)} | {mark.met(mark.aim)}"
        lines.append(f"| {mark.what} | {mark.against} | {sign} {mark.must:g} | {aim} | {mark.ratio:.2f} | {met} | {mark.figures} |")
    return "\n".join(lines) + "\n"


def main(folder: Path) -> list[Path]:
    pages = []
    for gpu in ("h100", "h200"):
        paths = (folder / f"kernels-attention-{gpu}.json", folder / f"kernels-attention-lengths-{gpu}.json")
        attention, lengths = (json.loads(path.read_text("utf-8")) if path.exists() else None for path in paths)
        if attention is not None:
            pages.append(folder / f"kernels-attention-marks-{gpu}.md")
            pages[-1].write_text(markdown(gpu, attention, lengths), encoding="utf-8")
    return pages


if __name__ == "__main__":
    print(*main(Path(sys.argv[1])), sep="\n")
