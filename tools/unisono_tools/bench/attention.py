"""Linear attention and multi-scale attention beside their peers: `python -m unisono_tools.bench.attention --device cuda --output …`

Peers: torch.compile of the plain form; flash-linear-attention, given φ(q) and φ(k); quadratic causal SDPA; jax-linear-attention's
recurrence, which has no normaliser. Those that are not installed are left out. Case by case, or `--together` some cases at a time, each
contestant in a process of its own (workers.py); a row is written as soon as it is there, and `--resume` measures those that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unisono_torch

from unisono_tools.bench import marks, report, workers
from unisono_tools.bench.contests import OURS, Case, Row, contest, names
from unisono_tools.bench.measure import ceilings

SUITES = {
    "attention": [
        Case(8, 4096, 16, 64),
        Case(8, 4096, 16, 64, scales=1),
        Case(8, 4096, 16, 128),
        Case(8, 1024, 16, 64),
        Case(8, 4096, 16, 64, scales=4),
        Case(8, 4096, 16, 16, values=64, feature_map="taylor2"),
        Case(1, 32768, 16, 128),
    ],
    # for the plot
    "lengths": [Case(32768 // length, length, 16, 64, tabled=False) for length in (512, 1024, 2048, 4096, 8192, 16384, 32768)],
    # for a CPU, and to see that the benchmark itself works
    "small": [
        Case(1, 96, 2, 16, "float32"),
        Case(2, 32, 1, 16, "float32", tabled=False),
        Case(1, 40, 1, 16, "float32", scales=2),
    ],
}
ELEMENTS = 2**25  # of q in a drawn case, at most: as in B8 T4096 H16 K64
HOST_CLOCK = (  # of results that do not say how they were timed
    "fla and jax-linear-attention are given φ(q) and φ(k), whose making is no part of their time; fla's based makes its own. The latter",
    "of the two is timed by the host's clock, all input sets in one call, the others by events. Of several scales its time is that of",
    "one recurrence, taken as many times, and of PyTorch's sum with the gates; its errors are the recurrence's. Retention has no gate.",
)
TOLD = (
    "fla and jax-linear-attention are given φ(q) and φ(k), whose making is no part of their time; fla's based makes its own. Zeros as the",
    "state before the first token are made before, too. The latter's time is that of its kernels on the device, as CUPTI records them,",
    "without the gaps between them; the others' is by events, gaps and all; ours so counted stands below each table. Of several scales",
    "it is the time of one recurrence, taken as many times, and of PyTorch's sum with the gates; its errors are the recurrence's.",
    "Retention has no gate.",
)
PAIRS = (("forward_ms", "both_ms", ".3f"), ("host_forward_ms", "host_both_ms", ".3f"), ("error_o", "error_gradient", ".1e"))


def drawn(seed: int, count: int = 6) -> list[Case]:
    """Cases of shapes that nobody chose: K and V from 16 to 256, to 128 where anything decays; of taylor2 K from 4 to 16."""
    made, rng = [], random.Random(seed)
    while len(made) < count:
        kind = ("linear", "linear", "one decay", "several scales", "taylor2")[len(made) % 5]
        scales = {"one decay": 1, "several scales": rng.randint(2, 5)}.get(kind, 0)
        width = rng.randint(4, 16) if kind == "taylor2" else rng.randint(16, 128 if scales else 256)
        values, heads, length = rng.randint(16, 128 if scales else 256), rng.randint(1, 24), rng.randint(200, 20_000)
        batch = max(1, rng.randint(1, ELEMENTS // (length * heads * max(width, values)) or 1))
        made.append(Case(batch, length, heads, width, scales=scales, values=values, feature_map="taylor2" if kind == "taylor2" else "elu1"))
    return made


def sources(op: str) -> str:
    """A digest of an operator's kernels, so that figures of two runs tell whether they are of the same."""
    folder, digest = Path(unisono_torch.__path__[0]) / "kernels" / op, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def markdown(result: dict[str, Any], picture: str = "") -> str:
    """picture: the file of the plot by length, if there is one."""
    lines = ["# Linear attention: kernels beside their peers", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    rate = result["ceilings"]["copy_bytes_per_s"]
    lines += [
        f"- measured ceiling: copy {rate / 1e9:.0f} GB/s, read plus written; floor: each input read once, each output written once",
        "",
        "Medians, device time. Errors: ‖a − exact‖ / ‖exact‖ against what each computes, in float64: of o and the worst gradient. × ours: "
        "its time over ours. Peak: what both ways take beyond the inputs; in all: with these, over inputs and outputs.",
    ]
    if any(case["tabled"] for case in result["cases"]):
        lines += ["", *result.get("told", HOST_CLOCK)]
    for case in result["cases"]:
        if not case["tabled"] or OURS not in (row["contestant"] for row in case["rows"]):
            continue
        floor = case["floor_ms"]
        lines += [
            "",
            f"## {case['name']}",
            "",
            f"Floor: forward {floor[0]:.3f} ms, both ways {sum(floor):.3f} ms. Kernels {case['kernels']}.",
            "",
        ]
        lines += [
            "| contestant | forward ms | × ours | of floor | both ms | × ours | of floor | error o | error gradient | peak MiB | in all |",
            "|---" * 11 + "|",
        ]
        ours = case["rows"][0]
        for row in case["rows"]:
            cells = [row["contestant"]]
            for way, least in (("forward_ms", floor[0]), ("both_ms", sum(floor))):
                cells += [f"{row[way]:.3f}", f"{row[way] / ours[way]:.2f}", f"{least / row[way]:.0%}"]
            cells += ["–" if row[e] is None else f"{row[e]:.1e}" for e in ("error_o", "error_gradient")]
            peak = row["peak_bytes"]
            cells += ["–", "–"] if peak is None else [f"{peak / 2**20:.0f}", f"{marks.memory(case, row):.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        if ours.get("kernels_forward_ms") is not None:
            lines += ["", f"Kernels of {OURS} alone: {ours['kernels_forward_ms']:.3f} / {ours['kernels_both_ms']:.3f} ms."]
        lines += ["", *(f"{name}: {why}." for name, why in case["missing"].items())] if case["missing"] else []
    lengths = [case for case in result["cases"] if not case["tabled"]]
    if lengths:
        found = list(dict.fromkeys(row["contestant"] for case in lengths for row in case["rows"]))
        lines += [
            "",
            "## By length",
            "",
            "Forward / both ways, ms. On a GPU by CUDA graph, and beside it with what the host takes to launch each",
        ]
        lines += [f"call. Errors: of o / of the worst gradient. Kernels {', '.join(sorted({case['kernels'] for case in lengths}))}.", ""]
        columns = [f"{name}, {what}" for name in found for what in ("graph", "eager", "errors")]
        lines += [f"| shape | floor | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
        for case in lengths:
            floor, rows, cells = case["floor_ms"], {row["contestant"]: row for row in case["rows"]}, []
            for name in found:
                row = rows.get(name, {})
                for a, b, form in PAIRS:
                    cells.append("–" if row.get(a) is None else f"{row[a]:{form}} / {row[b]:{form}}")
            lines.append(f"| {case['name']} | {floor[0]:.3f} / {sum(floor):.3f} | {' | '.join(cells)} |")
        lines += ["", f"![time against the length of a sequence, with the floor]({picture})"] * bool(picture)
    return "\n".join(lines) + "\n"


def plot(path: Path, result: dict[str, Any]) -> None:
    """Time against length at one number of tokens, with the floor."""
    from unisono_tools.experiments import figures

    cases = [case for case in result["cases"] if not case["tabled"]]
    names = list(dict.fromkeys(row["contestant"] for case in cases for row in case["rows"]))
    with figures.panels(path, 2, 10, 4.5) as panels:
        for axes, (way, title) in zip(panels, (("forward_ms", "forward"), ("both_ms", "forward and backward")), strict=True):
            for i, name in enumerate(names):
                points = [(case["length"], row[way]) for case in cases for row in case["rows"] if row["contestant"] == name]
                axes.plot(*np.array(points).T, **figures.look(name, i), markersize=4.5, label=name)
            floors = [case["floor_ms"][0] if way == "forward_ms" else sum(case["floor_ms"]) for case in cases]
            axes.plot([case["length"] for case in cases], floors, "--", color=figures.GREY, label="floor")
            axes.set(
                xscale="log",
                yscale="log",
                title=f"{title}, ms",
                xlabel=f"tokens a sequence ({cases[0]['batch'] * cases[0]['length']:,} in all)",
            )
            axes.set_xticks([case["length"] for case in cases], [f"{case['length']:,}" for case in cases], fontsize=8)
            axes.minorticks_off()
        figures.legend_below(panels[0], len(names) + 1)


def begun(output: Path, run: dict[str, str]) -> dict[str, Any]:
    """What the same command on the same kind of device left there; without cases whose kernels are others now."""
    old = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    for what in ("command", "device", "versions"):
        if old["run"][what] != run[what]:
            raise SystemExit(f"--resume: {output} has {what} {old['run'][what]}, here {run[what]}; begin a new file")
    if tuple(old.get("told", HOST_CLOCK)) != TOLD:
        raise SystemExit(f"--resume: {output} was timed in another way; begin a new file")
    old["cases"] = [case for case in old["cases"] if case["kernels"] == sources(case["op"])]
    return old


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", choices=sorted([*SUITES, "drawn"]), help="default: attention on a GPU, small on a CPU; drawn: by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the shapes of --suite drawn")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="cases whose name contains one of these")
    parser.add_argument("--repeats", type=int, default=10, help="rounds over the input sets")
    parser.add_argument("--patience", type=float, help="seconds a case's contestants may compile, side by side (GPU: 180); 0: one by one")
    parser.add_argument(
        "--together", type=int, default=1, metavar="CASES", help="cases whose contestants compile at once; timed one by one"
    )
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json, .md and .png are added")
    parser.add_argument("--resume", action="store_true", help="measure only what is missing in OUTPUT.json, or of other kernels there")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    suite = options.suite or ("attention" if options.device == "cuda" else "small")
    patience = options.patience if options.patience is not None else 180.0 * (options.device == "cuda")
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} thread(s)"
    order = drawn(options.seed) if suite == "drawn" else SUITES[suite]
    cases = [case for case in order if not options.only or any(part in case.name for part in options.only)]
    if not cases:
        parser.error(f"--only {options.only!r}: no such case in {suite}; there are: {'; '.join(case.name for case in order)}")
    command = f"python -m unisono_tools.bench.attention --device {options.device} --suite {suite} --repeats {options.repeats}"
    command += f" --seed {options.seed}" * (suite == "drawn")
    run = report.about(command, device, "torch", "triton", "fla-core", "jax", "jax-linear-attention")
    if options.resume and options.output and options.output.with_suffix(".json").exists():
        result = begun(options.output, run)
    else:
        result = {"run": run, "told": list(TOLD), "ceilings": ceilings(options.device), "cases": []}
    if options.device == "cuda":
        torch.cuda.empty_cache()
    if options.together < 1:
        parser.error(f"--together {options.together}: give 1 or more")
    for first in range(0, len(cases), options.together):
        some = cases[first : first + options.together]
        _measure(some, result, options.device, options.repeats, patience, options.output, [each.name for each in order])
    if options.output and not all(case["tabled"] for case in result["cases"]):
        plot(options.output.with_suffix(".png"), result)
    return 0


def _begun(case: Case, result: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """What there is of a case, or its beginning."""
    made = next((old for old in result["cases"] if old["name"] == case.name), None)
    if made is None:
        floor = [size / result["ceilings"]["copy_bytes_per_s"] * 1e3 for size in case.floor_bytes()]
        made = {"name": case.name, **dataclasses.asdict(case), "floor_ms": floor, "held_bytes": case.held_bytes()}
        made |= {"op": case.op, "kernels": sources(case.op), "rows": [], "missing": {}}
        result["cases"].append(made)
        result["cases"].sort(key=lambda old: order.index(old["name"]))
    return made


def _measure(
    cases: list[Case], result: dict[str, Any], device: str, repeats: int, patience: float, output: Path | None, order: list[str]
) -> None:
    """Measure the rows of these cases that are missing, and write them down one by one."""
    begun = {case.name: _begun(case, result, order) for case in cases}
    there = {(name, row["contestant"]) for name, made in begun.items() for row in made["rows"]}
    tasks = [(case, name, device, repeats) for case in cases for name in names(case, device) if (case.name, name) not in there]
    said = ""
    for (case, name, *_), row in workers.rows(contest, tasks, patience):
        if case.name != said:
            said = case.name
            print(said, flush=True)
        made, wanted = begun[case.name], names(case, device)
        if isinstance(row, Row):
            made["missing"].pop(name, None)
            made["rows"].append(dataclasses.asdict(row))
            made["rows"].sort(key=lambda row: wanted.index(row["contestant"]))
            off = "" if row.error_o is None else f", errors {row.error_o:.1e} {row.error_gradient:.1e}"
            print(f"  {name}: {row.forward_ms:.3f} / {row.both_ms:.3f}{off}", flush=True)
        elif name == OURS:
            raise RuntimeError(f"{case.name}: {row}")
        else:
            made["missing"][name] = row
            print(f"  {name}: {row}", flush=True)
        picture = f"{output.name}.png" if output and not case.tabled else ""
        report.keep(output, result, markdown(result, picture))


if __name__ == "__main__":
    raise SystemExit(main())
