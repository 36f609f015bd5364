"""Head and loss of a wide vocabulary: one operator, and the loss of logits that are kept.

python -m unisono_tools.bench.head --output docs/results/kernels-head-h100      # on a GPU; writes .json and .md
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from unisono_spec.contract import InputError
from unisono_torch.ops.elementwise import linear
from unisono_torch.ops.linear_cross_entropy import linear_cross_entropy

from unisono_tools.bench import report
from unisono_tools.bench.measure import ceilings, median_ms, peak_bytes

# rows, D, V; the third needs no padding
SHAPES = ((65536, 512, 50257), (65536, 768, 50257), (65536, 512, 50304), (16384, 512, 50257), (16384, 768, 50257))
CHECKED = 2048  # rows of which errors are measured
SETS = 2
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, None, targets)[0]


def kept(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Padded rows, and PyTorch's loss of them in float32 or wider."""
    logits = linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def contestants() -> dict[str, Loss]:
    found: dict[str, Loss] = {"one operator": ours, "logits kept": kept, "logits kept, compiled": torch.compile(kept, dynamic=False)}
    fused = getattr(F, "linear_cross_entropy", None)  # from torch 2.13 on
    if fused is not None:
        found["torch's linear_cross_entropy"] = lambda x, weight, targets: fused(x, weight.to(x.dtype), targets, reduction="sum")
    return found


def inputs(rows: int, width: int, vocabulary: int, device: str, seed: int) -> list[Tensor]:
    """x bfloat16, the weights float32 as parameters are, targets; logits of a variance near 1."""
    made = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, width, generator=made, device=device).bfloat16()
    weight = torch.randn(vocabulary, width, generator=made, device=device) * width**-0.5
    return [x.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocabulary, (rows,), generator=made, device=device)]


def both(loss: Loss, given: list[Tensor]) -> tuple[Tensor, ...]:
    """The loss as a training weighs it, and its gradients."""
    value = loss(*given) / len(given[0])
    return value.detach(), *torch.autograd.grad(value, given[:2])


def errors(loss: Loss, shape: tuple[int, int, int], device: str) -> dict[str, float]:
    """‖a − exact‖ / ‖exact‖ against float64."""
    given = inputs(min(shape[0], CHECKED), *shape[1:], device, 9)
    exact = both(kept, [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in given])
    found = zip(both(loss, given), exact, strict=True)
    return dict(zip(("loss", "dx", "dweight"), (float((a.double() - b).norm() / b.norm()) for a, b in found), strict=True))


def measured(loss: Loss, shape: tuple[int, int, int], device: str, repeats: int) -> dict[str, Any]:
    sets = [inputs(*shape, device, seed) for seed in range(SETS)]
    with torch.no_grad():
        forward = median_ms([lambda g=given: loss(*g) for given in sets], device, repeats)
    together = median_ms([lambda g=given: both(loss, g) for given in sets], device, repeats)
    peak = peak_bytes(lambda: both(loss, sets[0]), device)
    return {"forward_ms": forward, "both_ms": together, "peak_bytes": peak, "errors": errors(loss, shape, device)}


def markdown(result: dict[str, Any]) -> str:
    rate = result["ceilings"]["matmul_flop_per_s"]
    lines = ["# Head and loss", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    lines += [f"- bf16 matmul at {rate / 1e12:.0f} TFLOP/s; floor: products alone at that rate, one forward, three both ways", ""]
    lines += [
        "x bfloat16, weights float32; forward without gradients. Errors: ‖a − exact‖ / ‖exact‖ against float64, of up to 2,048 rows.",
        "",
    ]
    lines += ["| rows × D by V | contestant | forward ms | both ms | of floor | × ours | peak MiB | loss | ∂x | ∂W |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for case in result["cases"]:
        rows, width, vocabulary = case["shape"]
        floor, what = 6e3 * rows * width * vocabulary / rate, f"| {rows:,} × {width} by {vocabulary:,}"
        for row in case["rows"]:
            wrong = " | ".join(f"{row['errors'][name]:.1e}" for name in ("loss", "dx", "dweight"))
            peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
            lines.append(
                f"{what} | {row['contestant']} | {row['forward_ms']:.2f} | {row['both_ms']:.2f} | {floor / row['both_ms']:.0%} | "
                f"{row['both_ms'] / case['rows'][0]['both_ms']:.2f} | {peak} | {wrong} |"
            )
        lines += [f"{what} | {name} | – | – | – | – | {why} | | | |" for name, why in case["failed"].items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.head", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=[",".join(map(str, shape)) for shape in SHAPES], help="rows,D,V")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    words, device = sys.argv[1:] if argv is None else argv, "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} thread(s)"
    command = f"python -m unisono_tools.bench.head {' '.join(words)}".rstrip()
    result: dict[str, Any] = {"run": report.about(command, name, "unisono", "torch", "triton"), "ceilings": ceilings(device), "cases": []}
    for text in options.shapes:
        try:
            rows, width, vocabulary = map(int, text.split(","))
        except ValueError as error:
            raise InputError(f"shapes: {text!r} is not rows,D,V; give three numbers, as in 65536,512,50257") from error
        case: dict[str, Any] = {"shape": (rows, width, vocabulary), "rows": [], "failed": {}}
        result["cases"].append(case)
        torch.compiler.reset()  # past a few shapes of one function it would run as it is
        for contestant, loss in contestants().items():
            try:
                case["rows"].append({"contestant": contestant, **measured(loss, case["shape"], device, options.repeats)})
            except torch.OutOfMemoryError:
                case["failed"][contestant] = "out of memory"
                torch.cuda.empty_cache()
            report.keep(options.output, result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
