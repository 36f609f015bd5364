"""Finds how kernels are cut: `python -m unisono_tools.bench.tune linear_attention --way forward --widths 128 128`, on the GPU meant.

Each configuration runs in a process of its own, since a miscompiled one can end a process's use of the GPU. It is compared with plain
operations in float64, values, final states and every gradient, on marked and unmarked tokens whose outputs lie in memory full of NaN, and
timed only if it is right. What comes out is for kernels/<op>/table.py; nothing is tuned where a model runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from unisono_conformance import numerics
from unisono_torch.ops import mapped_attention, multiscale

from unisono_tools.bench.large import ROUNDINGS
from unisono_tools.bench.measure import median_ms
from unisono_tools.bench.report import about, ready

OPS = ("linear_attention", "multiscale")
CHECKED = ((2, 333, 3, True), (1, 1000, 2, False))  # B, T, H, with resets and tokens that are not valid
FIELDS = {
    "linear_attention": {"chunk": (32, 64, 128), "block": (32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3), "split": (False, True)},
    "multiscale": {
        "chunk": (32, 64), "blocks": (2,), "columns": (32, 64, 128), "warps": (2, 4, 8), "state_warps": (4,), "stages": (2,),
        "registers": (None, 168),
    },
    "taylor2": {"chunk": (32, 64, 128), "block": (32, 64), "warps": (4, 8), "stages": (1, 2), "registers": (None, 128, 168)},
    "linear_attention on Hopper": {
        "chunk": (64,), "block": (64, 128), "warps": (4, 8), "stages": (2, 3, 4), "programs": (132, 264),
    },
    "linear_attention forward on Hopper": {
        "chunk": (64,), "block": (64, 128), "warps": (4, 8), "stages": (2, 3, 4), "programs": (132, 264), "early": (False, True),
        "packed": (False, True), "crowded": (None, 3),
    },
    "multiscale on Hopper": {"stages": (2, 3, 4), "registers": (None, 128, 168)},
    "one decay on Hopper": {"chunk": (64, 128), "stages": (2, 3, 4)},
}  # fmt: skip
Given = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is tuned: an op in one dtype, at one pair of widths; timed at B × T × H."""

    op: str
    way: str
    dtype: str
    K: int
    V: int
    feature_map: str
    scales: int
    timed: tuple[int, int, int]
    hopper: bool = False  # the kernels in Gluon

    @property
    def both(self) -> bool:
        """Whether what is tuned has a part in gradients."""
        return self.way != "forward" or self.op == "multiscale"

    @property
    def swept(self) -> bool:
        """Whether it is one decay that is fixed, which has sweeps of its own."""
        return self.op == "multiscale" and self.hopper and self.scales == 1

    def install(self, cut: dict[str, Any]) -> None:
        """Make `cut` what the table says for this task."""
        product = "bfloat16" if self.dtype == "bfloat16" else "float32"
        if self.op == "linear_attention":
            from unisono_torch.kernels.linear_attention import table

            if self.hopper:
                table.HOPPER[table.served_as(self.way, self.K, self.V)] = table.HopperCut(**cut)
                return
            made = table.Cut(**cut)
            if self.feature_map == "taylor2":
                cuts, modes = {"forward": (table.CHUNKS, "o"), "backward": (table.CHUNKS, "qk"), "sweeps": (table.SWEEPS, "oqk")}[self.way]
                cuts |= {(mode, product): made for mode in modes}
            else:
                table.TABLE[self.way, product, table.width_of(self.K, self.V)] = made
        else:
            from unisono_torch.kernels.multiscale import table as scaled

            if self.swept:
                scaled.FEW = 0  # so that time is not cut where few heads are compared
                ways = ("forward",) if self.way == "forward" else ("of_queries", "of_keys")
                scaled.HOPPER_SWEEPS |= dict.fromkeys(ways, scaled.SweepCut(**cut))
                return
            if self.hopper:
                scaled.HOPPER = scaled.HopperCut(**cut)
                return
            key = product, scaled.width_of(self.K, self.V)
            (scaled.ONE if self.scales == 1 else scaled.TABLE)[key] = scaled.Cut(**cut)

    def draw(self, batch: int, length: int, heads: int, marked: bool, seed: int) -> Given:
        made = torch.Generator("cuda").manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=made, device="cuda")

        q, k, v, do = (normal(batch, length, heads, n).to(getattr(torch, self.dtype)) for n in (self.K, self.K, self.V, self.V))
        rows = 1 + self.K + self.K**2 if self.feature_map == "taylor2" else self.K
        scales = (self.scales,) if self.op == "multiscale" else ()
        given: Given = {"q": q, "k": k, "v": v, "S": normal(batch, *scales, heads, rows, self.V) / 8}
        given["z"] = torch.zeros(batch, *scales, heads, rows, device="cuda")
        if scales:
            given |= {
                "log_decay": -torch.rand(1, 1, *scales, device="cuda", generator=made),
                "weight": normal(batch, length, *scales, 1, 1),
            }
            given["q"], given["k"] = q.abs(), k.abs()
        given |= {"do": do, "reset": None, "valid": None}
        if marked:
            given["reset"] = torch.rand(batch, length, generator=made, device="cuda") < 0.01
            given["valid"] = torch.rand(batch, length, generator=made, device="cuda") < 0.9
        return given

    def run(self, given: Given, implementation: str, wide: bool = False, gradients: bool = True) -> dict[str, Tensor]:
        """o, the final state and every gradient."""
        names = [n for n in ("q", "k", "v", "log_decay", "weight", "S", "z") if n in given and not (self.swept and n == "log_decay")]
        leaves = {n: (given[n].double() if wide else given[n]).detach().requires_grad_() for n in names}
        marks = given["reset"], given["valid"]
        state = leaves["S"], leaves["z"]
        if self.op == "multiscale":
            q, k = leaves["q"], leaves["k"]
            more = leaves.get("log_decay", given["log_decay"].to(q.dtype if wide else torch.float32)), leaves["weight"]
            o, ends = multiscale.parallel(q, k, leaves["v"], q, k, *more, state, *marks, implementation=implementation)
        else:
            values = leaves["q"], leaves["k"], leaves["v"]
            o, ends = mapped_attention.parallel(*values, state, *marks, self.feature_map, None, implementation=implementation)
        outputs = {"o": o, "final S": ends[0], "final z": ends[1]}
        if not gradients:
            return {n: a.detach() for n, a in outputs.items()}
        found = torch.autograd.grad([o, *ends], list(leaves.values()), [given["do"].to(o.dtype), *(torch.ones_like(a) for a in ends)])
        return {n: a.detach() for n, a in (outputs | {f"d{n}": g for n, g in zip(leaves, found, strict=True)}).items()}

    def wrong(self) -> str:
        """What is wrong, or nothing. Norms are held to what the formula allows a sum; each value to being there and finite."""
        torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
        for batch, length, heads, marked in CHECKED:
            given = self.draw(batch, length, heads, marked, 1)
            found, again = (self.run(given, "triton", gradients=self.both) for _ in range(2))
            exact = self.run(given, "plain", wide=True, gradients=self.both)
            for name, a in found.items():
                error = float((a.double() - exact[name]).norm() / exact[name].norm())
                narrow = self.dtype if name in ("o", "dq", "dk", "dv") else "float32"
                budget = numerics.formula(narrow, length, ROUNDINGS, gradient=name[0] == "d") + numerics.formula(self.dtype, 1, ROUNDINGS)
                if not error <= budget:
                    return f"{name} at T={length} errs by {error:.1e} of its norm, {budget:.1e} allowed"
                if not torch.equal(a, again[name]):
                    return f"{name} at T={length} has other bits the second time"
        torch.use_deterministic_algorithms(False)
        return ""


def _timed(task: Task, lock: str, repeats: int) -> dict[str, float]:
    sets = [task.draw(*task.timed, False, seed) for seed in range(3)]

    def forward(given: Given) -> None:
        with torch.no_grad():
            if task.op == "multiscale":
                more = given["log_decay"], given["weight"], (given["S"], given["z"])
                multiscale.parallel(given["q"], given["k"], given["v"], given["q"], given["k"], *more, implementation="triton")
            else:
                state = given["S"], given["z"]
                mapped_attention.parallel(given["q"], given["k"], given["v"], state, feature_map=task.feature_map, implementation="triton")

    calls: list[Callable[[], object]] = [lambda g=g: forward(g) for g in sets]
    together: list[Callable[[], object]] = [lambda g=g: task.run(g, "triton") for g in sets]
    with pathlib.Path(lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # others compile meanwhile
        found = {"forward_ms": median_ms(calls, "cuda", repeats)}
        return found | ({"both_ms": median_ms(together, "cuda", repeats)} if task.both else {})


def one(task: Task, cut: dict[str, Any], lock: str, repeats: int) -> dict[str, Any]:
    """The row of one configuration."""
    task.install(cut)
    try:
        wrong = task.wrong()
        if wrong:
            return {**cut, "wrong": wrong}
        return {**cut, **_timed(task, lock, repeats)}
    except (RuntimeError, ValueError, ArithmeticError) as error:  # out of shared memory or registers, an illegal access
        return {**cut, "wrong": str(error).splitlines()[0][:120]}


def candidates(fields: dict[str, tuple], width: int, chosen: dict[str, list[int]]) -> Iterator[dict[str, Any]]:
    """Every combination; of columns no more than the widest head has, but 16."""
    fields = {name: tuple(chosen.get(name) or values) for name, values in fields.items()}
    for values in itertools.product(*fields.values()):
        cut = dict(zip(fields, values, strict=True))
        if chosen or cut.get("block", cut.get("columns", 0)) <= max(16, width):
            yield cut


def fields(options: argparse.Namespace) -> dict[str, tuple]:
    """By name, what is tried."""
    if options.feature_map == "taylor2":
        return FIELDS["taylor2"] | ({"every": (128, 256, 512)} if options.way == "sweeps" else {})
    if options.op == "multiscale" and options.hopper and options.scales == 1:
        return FIELDS["one decay on Hopper"]
    way = " forward" * (options.op == "linear_attention" and options.hopper and options.way == "forward")
    return FIELDS[options.op + way + " on Hopper" * options.hopper]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument(
        "--way",
        choices=("forward", "backward", "sweeps"),
        default="forward",
        help="of linear attention and of one decay on Hopper, which have a table for each; sweeps: taylor2's",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--widths", type=int, nargs=2, default=(64, 64), metavar=("K", "V"))
    parser.add_argument("--feature_map", default="elu1")
    parser.add_argument("--scales", type=int, default=4)
    parser.add_argument("--timed", type=int, nargs=3, default=(8, 4096, 16), metavar=("B", "T", "H"))
    parser.add_argument("--only", nargs="*", default=[], help="values of a field, as in chunk=64 warps=4,8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile at once")
    parser.add_argument("--hopper", action="store_true", help="the kernels in Gluon, which serve bfloat16 there")
    parser.add_argument("--output", type=pathlib.Path, help="a .json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    ready(parser, options.output)
    task = Task(
        options.op,
        options.way,
        options.dtype,
        options.widths[0],
        options.widths[1],
        options.feature_map,
        options.scales,
        tuple(options.timed),
        options.hopper,
    )
    if options.way == "sweeps" and options.feature_map != "taylor2":
        parser.error("--way sweeps: only taylor2 has them; give --feature_map taylor2, or another way")
    if options.one:
        print(json.dumps(one(task, json.loads(options.one), options.lock, options.repeats)))
        return 0
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    chosen = {name: [json.loads(x) for x in values.split(",")] for name, _, values in (pair.partition("=") for pair in options.only)}
    words = sys.argv[1:] if argv is None else argv
    lock = options.lock or f"{tempfile.gettempdir()}/unisono-tune.lock"
    waiting, running, rows = list(candidates(fields(options), max(options.widths), chosen)), [], []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            cut = waiting.pop(0)
            command = [sys.executable, "-m", "unisono_tools.bench.tune", *words, "--one", json.dumps(cut), "--lock", lock]
            running.append((cut, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)))
        cut, process = running.pop(0)
        out, err = process.communicate()
        row = json.loads(out.splitlines()[-1]) if process.returncode == 0 else {**cut, "wrong": err.strip().splitlines()[-1][:120]}
        rows.append(row)
        print(" ".join(f"{name}={value:.3f}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()), flush=True)
    what = "both_ms" if task.both else "forward_ms"
    rows.sort(key=lambda row: row.get(what, float("inf")))
    print("best:", rows[0])
    if options.output:
        run = about(f"python -m unisono_tools.bench.tune {' '.join(words)}", torch.cuda.get_device_name(), "unisono", "torch", "triton")
        options.output.write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
