"""MoM-GRU's loop: kernels and plain operations beside cuDNN's GRU, which has no memory; and each variant's kernels and errors.

python -m unisono_tools.bench.gru --output docs/results/kernels-gru-h100      # needs a GPU; writes .json and .md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import unisono_torch
from torch import Tensor
from unisono_spec.contract.maru import MARUConfig
from unisono_torch.kernels.mom_gru import native
from unisono_torch.ops import mom_gru

from unisono_tools.bench import report
from unisono_tools.bench.measure import median_ms, peak_bytes

LENGTH, SETS = 256, 3
BATCHES = (1, 16, 64)  # sequences
MARKED, MARKS = 16, {"forward_us": (20.0, 8.0), "both_us": (60.0, 25.0)}  # a batch, and µs a token: must, aim
WIDE: dict[str, Any] = {"n_banks": 6, "n_slots": 256, "d_memory": 128}
ODD: dict[str, Any] = {"d_model": 333, "n_banks": 3, "n_slots": 100, "d_memory": 50, "router_hidden": 20}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A cell, by what differs from maru's; with router="gumbel" noise, temperature and a balance bias as in training."""

    name: str
    batch: int
    changes: dict[str, Any]
    marked: bool = False
    length: int = 40


VARIANTS = (
    Variant("coupled, dense", 16, {}),
    Variant("separate", 5, {"erase": "separate"}),
    Variant("gumbel, balance", 2, {"router": "gumbel", "temperature": 0.7}),
    Variant("gumbel, balance, separate, marks", 8, {"router": "gumbel", "temperature": 0.7, "erase": "separate"}, True),
    Variant("coupled, marks", 64, {}, True, 20),
    Variant("odd widths, marks", 10, ODD, True),
    Variant("odd widths, one sequence", 1, {**ODD, "d_model": 77, "erase": "separate"}),
    Variant("maru-wide, marks", 16, WIDE, True),
    Variant("maru-wide", 32, WIDE),
    Variant("width 800", 4, {"d_model": 800}),
)


def inputs(variant: Variant, seed: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Any]]:
    """x, h and M; the cell's parameters; marks, noise and temperature."""
    config = MARUConfig(vocab_size=3, head_hidden=2, d_state=1, expand=1).replace(**variant.changes)
    made = torch.Generator("cuda").manual_seed(seed)
    b, t, n = variant.batch, variant.length, config.n_banks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, device="cuda")

    cell = unisono_torch.create(config, seed=seed, dtype="float32", device="cuda").get_submodule("layers.0.cell")
    named = itertools.chain(cell.named_parameters(), cell.named_buffers())
    p = {name: a.detach() + 0.3 * normal(*a.shape) if a.ndim == 1 else a.detach() for name, a in named}
    given = [normal(b, t, config.d_model), normal(b, config.d_model), p["memory"] + 0.3 * normal(b, *p["memory"].shape)]
    more: dict[str, Any] = {"temperature": config.temperature}
    if config.router == "gumbel":
        more["noise"] = -torch.empty(b, t, n, device="cuda").exponential_(generator=made).log().to(dtype)
    if variant.marked:
        more |= {
            "reset": torch.rand(b, t, generator=made, device="cuda") < 0.1,
            "valid": torch.rand(b, t, generator=made, device="cuda") < 0.8,
        }
    return [a.to(dtype) for a in given], {name: a.to(dtype) for name, a in p.items()}, more


def gradients(given: list[Tensor], p: dict[str, Tensor], more: dict[str, Any], how: str) -> tuple[list[Tensor], list[Tensor]]:
    """h of each token and the last memory; gradients of x, h, M and the parameters, of the outputs' sum."""
    x, h, M = leaves = [a.detach().requires_grad_() for a in given]
    p = {name: a if name.startswith("balance") else a.detach().requires_grad_() for name, a in p.items()}
    out, (_, last) = mom_gru.hoisted(x, p, (h, M), implementation=how, **more)
    wanted = [*leaves, *(a for a in p.values() if a.requires_grad)]
    return [out.detach(), last.detach()], list(torch.autograd.grad(out.sum() + last.sum(), wanted))


@contextlib.contextmanager
def watched() -> Iterator[dict[str, str]]:
    """Which kernels serve each way."""
    served: dict[str, str] = {}
    launch = native.launch

    def watching(name: str, *rest: Any) -> bool:
        there = launch(name, *rest)
        served[name] = "CUDA C++" if there else "Triton"
        return there

    native.launch = watching
    try:
        yield served
    finally:
        native.launch = launch


def judged(variant: Variant) -> dict[str, Any]:
    """Kernels in float32 against plain operations in float64: ‖a − exact‖ / ‖exact‖, of gradients the worst."""
    with watched() as served:
        outs, slopes = gradients(*inputs(variant, 9, torch.float32), "triton")
    exact_outs, exact_slopes = gradients(*inputs(variant, 9, torch.float64), "plain")

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    h, last = (error(a, b) for a, b in zip(outs, exact_outs, strict=True))
    worst = max(error(a, b) for a, b in zip(slopes, exact_slopes, strict=True))
    changes = ", ".join(f"{name}={value}" for name, value in variant.changes.items())
    return {"variant": variant.name, "batch": variant.batch, "changes": changes, **served, "h": h, "memory": last, "gradients": worst}


def timed(forward: Callable[[Any], Any], both: Callable[[Any], Any], sets: list[Any], repeats: int) -> dict[str, Any]:
    with torch.no_grad():
        there = median_ms([lambda g=g: forward(g) for g in sets], "cuda", repeats)
    back = median_ms([lambda g=g: both(g) for g in sets], "cuda", repeats)
    return {"forward_us": 1e3 * there / LENGTH, "both_us": 1e3 * back / LENGTH, "peak_bytes": peak_bytes(lambda: both(sets[0]), "cuda")}


def ours(batch: int, how: str) -> dict[str, Any]:
    sets = [inputs(Variant("", batch, {}, length=LENGTH), seed, torch.float32) for seed in range(SETS)]

    def forward(given: Any) -> object:
        (x, h, M), p, more = given
        return mom_gru.hoisted(x, p, (h, M), implementation=how, **more)

    def both(given: Any) -> object:
        arrays, p, more = given
        return gradients(arrays, p, more, how)

    return timed(forward, both, sets, 3)


def cudnn(batch: int) -> dict[str, Any]:
    gru = torch.nn.GRU(640, 640, batch_first=True, device="cuda", dtype=torch.float16)
    sets = [torch.randn(batch, LENGTH, 640, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(SETS)]
    return timed(gru, lambda x: torch.autograd.grad(gru(x)[0].sum(), [x, *gru.parameters()]), sets, 3)


def markdown(result: dict[str, Any]) -> str:
    lines = ["# MoM-GRU's loop on a GPU", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    lines += [
        f"- D = 640, 4 banks of 128 slots of 64, float32, {LENGTH} tokens; microseconds a token, medians; both ways with all gradients",
        "- cuDNN's GRU of that width is in float16, and has no memory",
        "",
        "| batch | by | forward µs | forward and backward µs | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for row in result["loops"]:
        lines.append(f"| {row['batch']} | {row['by']} | {row['forward_us']:.1f} | {row['both_us']:.1f} | {row['peak_bytes'] / 2**20:.0f} |")
    named = {"forward_us": "forward, µs", "both_us": "forward and backward, µs"}
    kernels = [row for row in result["loops"] if row["batch"] == MARKED and row["by"] == "kernels"]
    if kernels:
        lines += ["", f"Marks at batch {MARKED}:", "", *report.marks(((named[n], kernels[0][n], *MARKS[n]) for n in MARKS), ".1f")]
    lines += [
        "",
        "Variants: which kernels serve them, and errors against plain operations in float64, ‖a − exact‖ / ‖exact‖ (gradients: the worst).",
        "",
        "| variant | batch | unlike maru's cell | forward by | backward by | h | memory | gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["variants"]:
        errors = " | ".join(f"{row[name]:.1e}" for name in ("h", "memory", "gradients"))
        changes = row["changes"] or "–"
        lines.append(f"| {row['variant']} | {row['batch']} | {changes} | {row['forward']} | {row['backward']} | {errors} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="unisono_tools.bench.gru", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    result: dict[str, Any] = {
        "run": report.about("python -m unisono_tools.bench.gru", torch.cuda.get_device_name(), "unisono", "torch", "triton"),
        "loops": [],
        "variants": [],
    }
    contestants = {"kernels": lambda b: ours(b, "triton"), "cuDNN, GRU": cudnn, "plain": lambda b: ours(b, "plain")}
    for by, run in contestants.items():
        for batch in BATCHES:
            result["loops"].append({"batch": batch, "by": by, **run(batch)})
            print(result["loops"][-1], flush=True)
            report.keep(options.output, result, markdown(result))
    for variant in VARIANTS:
        result["variants"].append(judged(variant))
        print(result["variants"][-1], flush=True)
        report.keep(options.output, result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
