"""Normalised linear attention and multi-scale attention (scales.py): `python -m unisono_tools.bench.attention --device cuda --output …`

Peers: torch.compile of the plain form; flash-linear-attention with its normaliser, given φ(q) and φ(k); quadratic causal SDPA;
jax-linear-attention's recurrence, which has no normaliser. Those that are not installed are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from unisono_torch.ops import mapped_attention
from unisono_torch.ops.features import elu1

from unisono_tools.bench import scales
from unisono_tools.bench.contestants import serving
from unisono_tools.bench.measure import ceilings, median_ms, peak_bytes
from unisono_tools.bench.report import about

SETS = 3
OURS, PLAIN, COMPILED, SDPA = "unisono", "plain", "torch.compile of plain", "causal SDPA (softmax, quadratic)"
FLA, JLA = "fla", "jax-linear-attention, no normaliser"
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call. tabled: it has a table of its own, with every peer; the others make the plot. scales: multi-scale."""

    batch: int
    length: int
    heads: int
    width: int
    dtype: str = "bfloat16"
    tabled: bool = True
    scales: int = 0

    @property
    def name(self) -> str:
        scales = "one decay, " if self.scales == 1 else f"{self.scales} scales with gates, " if self.scales else ""
        return f"B{self.batch} T{self.length} H{self.heads} K=V={self.width}, {scales}{self.dtype}"

    def floor_bytes(self) -> tuple[int, int]:
        """Forward reads q, k, v and writes o; backward reads those of them that are inputs, and do, and writes three gradients."""
        one = self.batch * self.length * self.heads * self.width * torch.finfo(getattr(torch, self.dtype)).bits // 8
        return 4 * one, 7 * one


SUITES = {
    "attention": [
        Case(8, 4096, 16, 64),
        Case(8, 4096, 16, 128),
        Case(8, 4096, 16, 64, scales=1),
        Case(8, 4096, 16, 64, scales=4),
        Case(8, 1024, 16, 64),
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


@dataclasses.dataclass
class Row:
    """forward and both ways in ms; errors ‖a − exact‖ / ‖exact‖ of o and the worst gradient, of one head; bytes. None: not measured."""

    contestant: str
    forward_ms: float
    both_ms: float
    error_o: float | None = None
    error_gradient: float | None = None
    peak_bytes: int | None = None


def _ours(implementation: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, _, heads, width), V = q.shape, v.shape[-1]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        state = (
            torch.zeros(batch, heads, width, V, dtype=wide, device=q.device),
            torch.zeros(batch, heads, width, dtype=wide, device=q.device),
        )
        return mapped_attention.parallel(q, k, v, state, None, None, "elu1", implementation=implementation)[0]

    return run


def _fla() -> dict[str, Function]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ops = importlib.import_module("fla.ops.linear_attn")

    def of(function: Callable) -> Function:
        return lambda q, k, v: function(q, k, v, scale=1.0, normalize=True)[0]

    return {f"{FLA} {name}": of(getattr(ops, f"{name}_linear_attn")) for name in ("chunk", "fused_chunk")}


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)


def contestants(case: Case, device: str) -> dict[str, tuple[Function, bool]]:
    """By name; whether it computes what ours does of q, k and v, or is given φ(q) and φ(k)."""
    widths, settings = {"K": case.width, "V": case.width}, {"feature_map": "elu1", "one_dtype": True}
    best, *_ = serving("torch", "linear_attention", device, case.dtype, widths, settings)
    found: dict[str, tuple[Function, bool]] = {OURS: (_ours(best), False)}
    if case.tabled:
        found[PLAIN] = _ours("plain"), False
    if device == "cuda":
        if case.tabled:
            found[COMPILED] = torch.compile(_ours("plain"), dynamic=False), False
        if importlib.util.find_spec("fla"):
            found |= {name: (run, True) for name, run in _fla().items() if case.tabled}  # it tunes each length
        found[SDPA] = _sdpa, False
    return found


def random_inputs(case: Case, device: str, seed: int) -> tuple[Tensor, ...]:
    """q, k, v, do."""
    made = torch.Generator(device).manual_seed(seed)
    shape = (case.batch, case.length, case.heads, case.width)
    return tuple(torch.randn(shape, generator=made, device=device).to(getattr(torch, case.dtype)) for _ in range(4))


def both(run: Function, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    """o, dq, dk, dv."""
    leaves = [a.detach().requires_grad_() for a in (q, k, v)]
    o = run(*leaves)
    return o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def measure(case: Case, device: str, repeats: int) -> list[Row]:
    if case.scales:
        return _measure_scales(case, device, repeats)
    sets, rows = [random_inputs(case, device, seed) for seed in range(SETS)], []
    head = [a[:1, :, :1].double() for a in sets[0]]  # heads do not mix
    exact = both(_ours("plain"), *head)
    features = [(elu1(q), elu1(k), v, do) for q, k, v, do in sets]
    of_features = both(lambda q, k, v: _normalised(q, k, v), *(a[:1, :, :1].double() for a in features[0])) if case.length <= 8192 else None
    for name, (run, given) in contestants(case, device).items():
        arrays = features if given else sets
        try:
            found, true = both(run, *arrays[0]), of_features if given else exact
            errors = None if name == SDPA or true is None else [_error(a[:1, :, :1], b) for a, b in zip(found, true, strict=True)]
            forward = median_ms([lambda s=s, run=run: run(*s[:3]) for s in arrays], device, repeats)
            whole = median_ms([lambda s=s, run=run: both(run, *s) for s in arrays], device, repeats)
            peak = peak_bytes(lambda run=run, arrays=arrays: both(run, *arrays[0]), device)
            rows.append(Row(name, forward, whole, *((None, None) if errors is None else (errors[0], max(errors[1:]))), peak))
        except (RuntimeError, ValueError, TypeError) as error:  # a peer that refuses the shape
            if name == OURS:
                raise
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    if case.tabled and device == "cuda" and importlib.util.find_spec("jla"):
        rows.append(Row(JLA, *scales.time_jax(features, 0.0, repeats)))
    return rows


def _normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of features, quadratically."""
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).tril()
    return ((scores @ v.transpose(1, 2)) / (scores.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2)


def _measure_scales(case: Case, device: str, repeats: int) -> list[Row]:
    shape = case.batch, case.length, case.heads, case.width, case.scales
    return [Row(name, *numbers) for name, numbers in scales.measure(*shape, case.dtype, device, repeats).items()]


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Linear attention: kernels beside their peers", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    rate = result["ceilings"]["copy_bytes_per_s"]
    lines += [
        f"- measured ceiling: copy {rate / 1e9:.0f} GB/s, read plus written; floor: each input read once, each output written once",
        "",
    ]
    lines += [
        "Medians, device time. Errors: ‖a − exact‖ / ‖exact‖ against float64, of o and of the worst gradient. × ours: its time over ours."
    ]
    for case in result["cases"]:
        if not case["tabled"]:
            continue
        floor = case["floor_ms"]
        lines += ["", f"## {case['name']}", "", f"Floor: forward {floor[0]:.3f} ms, both ways {sum(floor):.3f} ms.", ""]
        lines += [
            "| contestant | forward ms | × ours | of floor | both ms | × ours | of floor | error o | error gradient | peak MiB |",
            "|---" * 10 + "|",
        ]
        ours = case["rows"][0]
        for row in case["rows"]:
            cells = [row["contestant"]]
            for way, least in (("forward_ms", floor[0]), ("both_ms", sum(floor))):
                cells += [f"{row[way]:.3f}", f"{row[way] / ours[way]:.2f}", f"{least / row[way]:.0%}"]
            cells += ["–" if row[e] is None else f"{row[e]:.1e}" for e in ("error_o", "error_gradient")]
            cells += ["–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lengths = [case for case in result["cases"] if not case["tabled"]]
    if lengths:
        names = list(dict.fromkeys(row["contestant"] for case in lengths for row in case["rows"]))
        lines += ["", "## By length", "", "Forward and both ways, ms.", "", f"| shape | floor | {' | '.join(names)} |"]
        lines += ["|---" * (2 + len(names)) + "|"]
        for case in lengths:
            floor, rows = case["floor_ms"], {row["contestant"]: row for row in case["rows"]}
            cells = [f"{rows[name]['forward_ms']:.3f} / {rows[name]['both_ms']:.3f}" if name in rows else "–" for name in names]
            lines.append(f"| {case['name']} | {floor[0]:.3f} / {sum(floor):.3f} | {' | '.join(cells)} |")
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
                xlabel=f"tokens a sequence ({cases[0]['batch'] * cases[0]['length']} in all)",
            )
        figures.legend_below(panels[0], len(names) + 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", choices=sorted(SUITES), help="default: attention on a GPU, small on a CPU")
    parser.add_argument("--only", default="", help="cases whose name contains this; peers tune and compile for minutes at each shape")
    parser.add_argument("--repeats", type=int, default=10, help="rounds over the input sets")
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json, .md and .png are added")
    options = parser.parse_args(argv)
    suite = options.suite or ("attention" if options.device == "cuda" else "small")
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} thread(s)"
    command = f"python -m unisono_tools.bench.attention --device {options.device} --suite {suite} --repeats {options.repeats}"
    command += f" --only '{options.only}'" if options.only else ""
    packages = "torch", "triton", "fla-core", "jax", "jax-linear-attention"
    result: dict[str, Any] = {"run": about(command, device, *packages), "ceilings": ceilings(options.device), "cases": []}
    cases = [case for case in SUITES[suite] if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only!r}: no such case in {suite}; there are: {'; '.join(case.name for case in SUITES[suite])}")
    for case in cases:
        rows = measure(case, options.device, options.repeats)
        floor = [size / result["ceilings"]["copy_bytes_per_s"] * 1e3 for size in case.floor_bytes()]
        made = {"name": case.name, **dataclasses.asdict(case), "floor_ms": floor, "rows": [dataclasses.asdict(row) for row in rows]}
        result["cases"].append(made)
        print(case.name, *(f"{row.contestant}: {row.forward_ms:.3f} / {row.both_ms:.3f}" for row in rows), sep="\n  ", flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            options.output.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    if options.output and not all(case.tabled for case in cases):
        plot(options.output.with_suffix(".png"), result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
