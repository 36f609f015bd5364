"""What LAT and Based take beside linear attention: `python -m unisono_tools.bench.based --output OUTPUT`, on a GPU.

taylor2 beside flash-linear-attention's kernels of Based; attention over a window beside flex attention and quadratic causal SDPA; RoPE and
a feature map beside torch.compile of the same operations. Those that are not installed are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from unisono_torch.ops import mapped_attention, rotary, window

from unisono_tools.bench import report
from unisono_tools.bench.measure import ceilings, median_ms, peak_bytes

SETS, WINDOW = 3, 64
SHAPES = {"cuda": (8, 4096, 16), "cpu": (1, 96, 2)}  # B, T, H
CHECKED = (1, 700, 2)  # errors are measured here, against float64
Function = Callable[..., tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """widths: of q, k and v. floor: arrays' entries that a head's token must move, forward and both ways; ours: by implementation."""

    name: str
    widths: tuple[int, ...]
    floor: tuple[int, int]
    ours: Callable[[str], Function]
    peers: Callable[[], dict[str, Function]] = dict


def _taylor2(implementation: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        batch, _, heads, K = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        S, z = (torch.zeros(batch, heads, 1 + K + K**2, *more, device=q.device, dtype=wide) for more in (v.shape[-1:], ()))
        return mapped_attention.parallel(q, k, v, (S, z), feature_map="taylor2", implementation=implementation)[:1]

    return run


def _fla() -> dict[str, Function]:
    if importlib.util.find_spec("fla") is None:
        return {}
    based = importlib.import_module("fla.ops.based")
    return {
        "fla parallel_based": lambda *x: (based.parallel_based(*x, use_norm=True),),
        "fla fused_chunk_based": lambda *x: (based.fused_chunk_based(*x, use_norm=True),),
    }


def _window(implementation: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        keys = q.new_zeros(q.shape[0], WINDOW, *q.shape[2:])
        return window.parallel(q, k, v, (keys, keys, q.new_zeros(q.shape[:1], dtype=torch.int32)), implementation=implementation)[:1]

    return run


def _fused_attention() -> dict[str, Function]:
    def heads(*x: Tensor) -> list[Tensor]:
        return [a.transpose(1, 2) for a in x]

    def causal(*x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = heads(*x)
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)

    found: dict[str, Function] = {"causal SDPA (quadratic)": causal}
    if torch.cuda.is_available():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        T = SHAPES["cuda"][1]
        mask = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - WINDOW), None, None, T, T, device="cuda")
        flex: Any = torch.compile(flex_attention, dynamic=False)
        found["flex attention, compiled"] = lambda *x: (flex(*heads(*x), block_mask=mask),)
    return found


_turns: dict[tuple, tuple[Tensor, Tensor]] = {}  # a model makes them once for all its layers


def _rotary(feature_map: str, numerator: bool) -> Callable[[str], Function]:
    def made(implementation: str) -> Function:
        def run(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            wide = torch.promote_types(q.dtype, torch.float32)
            key = q.shape[1], q.shape[-1], wide, q.device.type
            if key not in _turns:
                position = torch.arange(q.shape[1], device=q.device, dtype=torch.int32)[None]
                _turns[key] = rotary.cos_sin(position, q.shape[-1], dtype=wide)
            found = rotary.turned(q, k, *_turns[key], feature_map, None, numerator, implementation)
            return tuple(a.to(q.dtype) for a in (found if numerator else found[:2]))

        return run

    return made


CASES = (
    Case("taylor2, K = 16, V = 64", (16, 16, 64), (160, 160 + 256), _taylor2, _fla),
    Case(f"window of {WINDOW}, K = V = 64", (64, 64, 64), (256, 256 + 448), _window, _fused_attention),
    Case("RoPE of q and k, K = 64", (64, 64), (256, 512), _rotary("none", False)),
    Case("RoPE of q and k, K = 128", (128, 128), (512, 1024), _rotary("none", False)),
    Case("RoPE, then elu1, K = 64", (64, 64), (256, 640), _rotary("elu1", False)),
    Case("elu1, then RoPE in the numerator only, K = 64", (64, 64), (384, 896), _rotary("elu1", True)),
)


def inputs(case: Case, shape: tuple[int, int, int], device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Slices of one array, as a projection gives them."""
    made = torch.Generator(device).manual_seed(seed)
    whole = torch.randn(*shape[:2], shape[2] * sum(case.widths), generator=made, device=device).to(torch.bfloat16).to(dtype)
    return [a.unflatten(-1, (shape[2], -1)).requires_grad_() for a in whole.split([shape[2] * n for n in case.widths], -1)]


def both(run: Function, given: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = run(*given)
    return [a.detach() for a in (*outputs, *torch.autograd.grad(outputs, given, [torch.ones_like(o) for o in outputs]))]


def error(case: Case, run: Function, device: str) -> float:
    """The worst ‖a − exact‖ / ‖exact‖ of outputs and gradients, against plain operations in float64."""
    found = both(run, inputs(case, CHECKED, device, 9))
    exact = both(case.ours("plain"), inputs(case, CHECKED, device, 9, torch.float64))
    return max(float((a.double() - e).norm() / e.norm()) for a, e in zip(found, exact, strict=True))


def measure(case: Case, device: str, repeats: int) -> list[dict[str, Any]]:
    contestants = {"unisono": case.ours("auto"), "plain": case.ours("plain")}
    if device == "cuda":
        contestants["torch.compile of plain"] = torch.compile(case.ours("plain"), dynamic=False)  # pyright: ignore[reportArgumentType]
    sets, rows = [inputs(case, SHAPES[device], device, seed) for seed in range(SETS)], []
    for name, run in (contestants | case.peers()).items():
        with torch.no_grad():
            forward = median_ms([lambda g=given, run=run: run(*g) for given in sets], device, repeats)
        together = median_ms([lambda g=given, run=run: both(run, g) for given in sets], device, repeats)
        checked = name == "unisono" or name == "plain"
        rows.append(
            {
                "contestant": name, "forward_ms": forward, "both_ms": together, "error": error(case, run, device) if checked else None,
                "peak_bytes": peak_bytes(lambda run=run: both(run, sets[0]), device),
            }
        )  # fmt: skip
        print(case.name, name, f"{forward:.3f} / {together:.3f} ms", flush=True)
    return rows


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Based's and LAT's other operators", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    lines += [
        f"- measured ceiling: copy {result['ceilings']['copy_bytes_per_s'] / 1e9:.0f} GB/s, read plus written; floor: each array once",
        "",
        "B8 T4096 H16, bfloat16, from the state before the first token, no marks. Medians, device time with all launches of a call. Error: "
        "the worst ‖a − exact‖ / ‖exact‖ of outputs and gradients, against float64. Peak: what both ways take beyond the inputs.",
    ]
    for case in result["cases"]:
        forward, together = case["floor_ms"]
        lines += ["", f"## {case['name']}", "", f"Floor: forward {forward:.3f} ms, both ways {together:.3f} ms.", ""]
        lines += ["| contestant | forward ms | × ours | of floor | both ms | × ours | of floor | error | peak MiB |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        ours = case["rows"][0]
        for row in case["rows"]:
            a, b = row["forward_ms"], row["both_ms"]
            off = "–" if row["error"] is None else f"{row['error']:.1e}"
            peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            lines.append(
                f"| {row['contestant']} | {a:.3f} | {a / ours['forward_ms']:.2f} | {forward / a:.0%} | {b:.3f} | {b / ours['both_ms']:.2f} "
                f"| {together / b:.0%} | {off} | {peak} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.based", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", metavar="PART", help="cases whose names have this part")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    words = sys.argv[1:] if argv is None else argv
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} thread(s)"
    command = f"python -m unisono_tools.bench.based {' '.join(words)}".rstrip()
    run = report.about(command, name, "torch", "triton", "fla-core")
    result: dict[str, Any] = {"run": run, "ceilings": ceilings(options.device), "cases": []}
    batch, length, heads = SHAPES[options.device]
    for case in CASES:
        if options.only not in case.name:
            continue
        floor = [2 * batch * length * heads * n / result["ceilings"]["copy_bytes_per_s"] * 1e3 for n in case.floor]
        result["cases"].append({"name": case.name, "floor_ms": floor, "rows": measure(case, options.device, options.repeats)})
        report.keep(options.output, result, markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
