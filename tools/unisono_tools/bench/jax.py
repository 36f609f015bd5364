"""JAX on a GPU: ops beside their peers, models in training, and decoded tokens.

python -m unisono_tools.bench.jax --output docs/results/kernels-jax-h100      # writes .json and .md

Each row has a thread of its own, or a process (workers.py). It is written as soon as it is there, and `--resume` measures those that are
missing.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import unisono_jax
from unisono_jax import decoding

from unisono_tools.bench import report, workers
from unisono_tools.bench.jax_ops import OPS, contestants
from unisono_tools.bench.jax_rows import Row, contest, copy_rate

LONGEST_EXACT = 4096  # tokens: errors are measured up to here
MODELS = (  # batch, length, implementations
    ("lat-base", 8, 2048, ("auto", "plain")),
    ("lat-base", 1, 16384, ("auto",)),
    ("s4d-base", 8, 2048, ("auto",)),
    ("maru", 8, 512, ("auto",)),
    ("mamba-130m", 8, 2048, ("jla", "pallas")),
)
DECODED, CONTEXTS = ("lat-base", "mamba-130m", "transformer-base"), (1 << 10, 1 << 15)
PARTS = (*OPS, "models", "decode")
COLUMNS = (
    "contestant",
    "forward ms",
    "device",
    "of floor",
    "both ms",
    "device",
    "of floor",
    "error o",
    "error gradient",
    "peak MiB",
    "compiles in s",
)
OURS = ("pallas", "plain", "jla")  # names of implementations, whose failures are ours
STEP = ("model", "batch", "length", "implementation")
LATE = ("not ready after", "its process ended")  # how notes begin that say nothing of the contestant


def sources(*names: str) -> str:
    """A digest of this room's files of these names and of all that they import here, or of all files, so that figures of two runs tell
    whether they are of the same."""
    folder, digest = pathlib.Path(unisono_jax.__path__[0]), hashlib.sha256()
    waiting = [path for path in folder.rglob("*.py") if not names or path.stem in names]
    found = set[pathlib.Path]()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(path, folder)
    for path in sorted(found):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def imported(path: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """The modules of the package in `folder` that a file of it imports, inside functions too; a package where a name is its own."""

    def file(module: str) -> pathlib.Path | None:
        stem = folder.parent / module.replace(".", "/")
        return next((each for each in (stem.with_suffix(".py"), stem / "__init__.py") if each.is_file()), None)

    found = set[pathlib.Path | None]()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {file(f"{node.module}.{each.name}") or file(node.module) for each in node.names}
        elif isinstance(node, ast.Import):
            found |= {file(each.name) for each in node.names}
    return [each for each in found if each and each.is_relative_to(folder)]


def late(row: Row) -> bool:
    return row.get("note", "").startswith(LATE)


def begun(old: Row, run: dict[str, str]) -> Row:
    """What a run with the same versions on the same kind of device left, of the same sources; what was late is measured again."""
    for what in ("device", "versions"):
        if old["run"][what] != run[what]:
            raise SystemExit(f"--resume: {what} is {run[what]} here, there {old['run'][what]}; begin a new file")
    old["ops"] = [case for case in old["ops"] if case.get("sources") == sources(case["op"])]
    for case in old["ops"]:
        case["rows"] = [row for row in case["rows"] if not late(row)]
    for part in ("models", "decode"):
        old[part] = [row for row in old[part] if row.get("sources") == sources() and not late(row)]
    commands = dict.fromkeys([*old["run"]["command"].split("; "), run["command"]])
    return old | {"run": run | {"command": "; ".join(commands)}}


def markdown(result: Row) -> str:
    lines = ["# JAX on a GPU", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    lines += [
        f"- copy {result['copy_bytes_per_s'] / 1e9:.0f} GB/s, read plus written; floor: each input read once, each output written once",
        "- medians of rounds over three input sets, each called up to ten times in one, by the host; bfloat16, states and Δ in float32",
        "- device: what its kernels and copies take a call, by JAX's profiler",
        "- errors: ‖a − exact‖ / ‖exact‖ against float64, of o and of the worst gradient; peak: temporaries and outputs of both ways",
    ]
    for case in result["ops"]:
        floor = case["floor_ms"] or (0.0, 0.0)
        lines += ["", f"## {case['op']}, {' '.join(f'{a}{n}' for a, n in zip(OPS[case['op']].axes, case['shape'], strict=True))}", ""]
        if case["floor_ms"]:
            lines += [f"Floor: forward {floor[0]:.3f} ms, both ways {sum(floor):.3f} ms.", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in case["rows"]:
            if "both_ms" not in row:
                lines.append(f"| {row['contestant']} | {row['note']} |" + " |" * 9)
                continue
            cells = [row["contestant"]]
            for way, least in (("forward", floor[0]), ("both", sum(floor))):
                device = row.get(f"{way}_device_ms")
                cells += [f"{row[f'{way}_ms']:.3f}", f"{device:.3f}" if device else "–", f"{least / row[f'{way}_ms']:.0%}"]
            cells += [f"{row[e]:.1e}" if e in row else "–" for e in ("error_o", "error_gradient")]
            lines.append(f"| {' | '.join(cells)} | {row['peak_bytes'] / 2**20:.0f} | {row['compile_s']:.1f} |")
    lines += [
        "",
        "## Models in training",
        "",
        "| model | B × T | implementation | tokens/s | temporaries GiB | compiles in s |",
        "|---" * 6 + "|",
    ]
    for row in result["models"]:
        if "note" in row:
            lines.append(f"| {row['model']} | {row['batch']} × {row['length']:,} | {row['implementation']} | {row['note']} | – | – |")
            continue
        cells = [row["model"], f"{row['batch']} × {row['length']:,}", row["implementation"], f"{row['tokens_per_s']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} | {row['temporary_bytes'] / 2**30:.1f} | {row['compile_s']:.0f} |")
    lines += ["", "## Decoding", "", f"Batch 1, greedy, {decoding.BLOCK} ids a call of the compiled loop.", ""]
    lines += ["| model | context | µs a token | traces for six calls |", "|---|---|---|---|"]
    for row in result["decode"]:
        cells = [f"{row['us']:,.0f}", str(row["traces"])] if "us" in row else [row["note"], "–"]
        lines.append(f"| {row['model']} | {row['context']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def wanted(parts: list[str], result: Row, repeats: int, folder: str) -> list[tuple[Any, ...]]:
    """Tasks of what the result has not yet, in the order of the parts; an op's truth before its rows."""
    tasks: list[tuple[Any, ...]] = []
    for part in parts:
        if part == "models":
            there = {tuple(row[name] for name in STEP) for row in result["models"]}
            tasks += [("model", *each) for each in ((*m[:3], how) for m in MODELS for how in m[3]) if each not in there]
        elif part == "decode":
            there = {(row["model"], row["context"]) for row in result["decode"]}
            missing = {name: tuple(context for context in CONTEXTS if (name, context) not in there) for name in DECODED}
            tasks += [("decode", name, contexts) for name, contexts in missing.items() if contexts]
        else:
            tasks += wanted_op(part, result, repeats, folder)
    return tasks


def of(result: Row, op: str, shape: tuple[int, ...]) -> list[Row]:
    return [case for case in result["ops"] if (case["op"], tuple(case["shape"])) == (op, shape)]


def wanted_op(op: str, result: Row, repeats: int, folder: str) -> list[tuple[Any, ...]]:
    tasks: list[tuple[Any, ...]] = []
    for shape in OPS[op].shapes:
        there = {row["contestant"] for case in of(result, op, shape) for row in case["rows"]}
        rows = [("op", op, shape, name, repeats, folder) for name in contestants(op, shape) if name not in there]
        tasks += [("truth", op, shape, folder)] * (bool(rows) and shape[1] <= LONGEST_EXACT) + rows
    return tasks


def enter(result: Row, task: tuple[Any, ...], said: Any, digest: Callable[..., str]) -> None:
    """A task's row or rows, or a note that says why there is none."""
    kind, name = task[:2]
    if kind == "model":
        row = {"note": said[:90]} if isinstance(said, str) else said
        result["models"].append({**dict(zip(STEP, task[1:], strict=True)), **row, "sources": digest()})
    elif kind == "decode":
        rows = [{"model": name, "context": context, "note": said[:90]} for context in task[2]] if isinstance(said, str) else said
        result["decode"] += [row | {"sources": digest()} for row in rows]
    elif kind == "op":
        if not of(result, name, task[2]):
            result["ops"].append({"op": name, "shape": task[2], "sources": digest(name), "floor_ms": None, "rows": []})
            result["ops"].sort(key=lambda case: (list(OPS).index(case["op"]), OPS[case["op"]].shapes.index(tuple(case["shape"]))))
        (case,) = of(result, name, task[2])
        row = {"contestant": task[3], "note": said[:90]} if isinstance(said, str) else said
        if "bytes" in row:
            (ins, do), rate = row.pop("bytes"), result["copy_bytes_per_s"]
            case["floor_ms"] = [1e3 * (ins + do) / rate, 1e3 * (2 * ins + do) / rate]
        case["rows"].append(row)
        order = list(contestants(name, task[2]))
        case["rows"].sort(key=lambda row: order.index(row["contestant"]) if row["contestant"] in order else len(order))
    print({**dict(zip(("kind", "of", "what", "contestant"), task, strict=False)), "said": said}, flush=True)


def failed(task: tuple[Any, ...], said: Any) -> bool:
    """Whether an implementation of ours did not do what it serves."""
    return task[0] == "op" and task[3] in OURS and isinstance(said, str) and not said.startswith(LATE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.jax", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=25, help="rounds of a row, fewer where they take long (25)")
    parser.add_argument(
        "--patience",
        type=float,
        help="seconds that rows may compile, in processes; 0: one by one (threads, as long as it takes)",
    )
    parser.add_argument("--at-once", type=int, default=8, help="rows that compile side by side and are timed before the next begin (8)")
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added")
    parser.add_argument("--resume", action="store_true", help="measure only what is missing in OUTPUT.json, or of other sources there")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    if options.at_once < 1:
        parser.error(f"--at-once {options.at_once}: give 1 or more")
    if options.patience:  # else the first process takes most of the GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() != "gpu":
        parser.error("JAX sees no GPU here")
    command = "python -m unisono_tools.bench.jax" + ("" if options.parts == list(PARTS) else f" --parts {' '.join(options.parts)}")
    about = report.about(command, jax.devices()[0].device_kind, "unisono", "jax", "flax", "jax-linear-attention")
    result: Row = {"run": about, "copy_bytes_per_s": copy_rate(), "ops": [], "models": [], "decode": []}
    there = options.output and options.output.with_suffix(".json")
    if options.resume and there and there.exists():
        result = begun(json.loads(there.read_text("utf-8")), about)
    digest, wrong = functools.cache(sources), []
    with tempfile.TemporaryDirectory() as folder:
        tasks = wanted(options.parts, result, options.repeats, folder)
        if options.patience is None:  # of threads, only one counts the traces of the loop that decodes
            alone = [task for task in tasks if task[0] == "decode"]
            others = [task for task in tasks if task[0] != "decode"]
            rows = itertools.chain(*(workers.side_by_side(contest, *each) for each in ((others, options.at_once), (alone, 1))))
        else:
            rows = workers.rows(contest, tasks, options.patience, options.at_once)
        for task, said in rows:
            enter(result, task, said, digest)
            report.keep(options.output, result, markdown(result))
            wrong += [f"{' '.join(map(str, task[1:4]))}: {said}"] * failed(task, said)
    print(markdown(result), *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
