"""S4D's recurrence: kernel and plain operations; and models trained, with what they use of the GPU.

python -m unisono_tools.bench.ssm --output docs/results/kernels-ssm-h200      # needs a GPU; writes .json and .md
python -m unisono_tools.bench.ssm --training --compiled mamba-130m s4d-base --output docs/results/trained-ssm-h100      # models alone
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from unisono_spec.contract import count_params, preset
from unisono_torch.ops import diagonal_ssm

from unisono_tools.bench import report, scan
from unisono_tools.bench.contestants import serving
from unisono_tools.bench.measure import LOCK, ceilings, median_ms, peak_bytes
from unisono_tools.bench.models import operations
from unisono_tools.experiments.match import nearest

SHAPES = ((8, 2048, 512, 32), (8, 4096, 512, 32), (1, 16384, 512, 32), (8, 2049, 500, 30))  # B, T, D, pairs; bfloat16
FASTER = 5  # times as fast as plain operations: the mark of the op
HALF = 0.5  # of the tokens a second of a LAT as large: mamba-130m's mark
CHECKED = (2, 1101, 99, 30)  # errors are measured here, against float64; enough tokens for products of chunks
MATCHED = "lat, as large as mamba-130m"
MODELS = {"s4d-base": (8, 2048), "mamba-130m": (8, 2048), MATCHED: (8, 2048), "maru": (8, 256), "lat-base": (8, 2048)}
STEPS = 12
SLOW = (1, 512)  # transformers' Mamba without CUDA extensions, and ours beside it
PARTS = ("u", "dt", "A", "C", "D", "state")


def inputs(shape: tuple[int, int, int, int], seed: int) -> list[Tensor]:
    """By the order of PARTS, at S4D's initial values."""
    b, t, d, p = shape
    made = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=made, device="cuda")

    dt = torch.rand(d, generator=made, device="cuda", dtype=torch.float64).mul(4.6).sub(6.9).exp()
    A = torch.stack([-0.5 * normal(d, p).exp(), torch.pi * torch.arange(p, device="cuda").expand(d, p)], -1).double()
    return [normal(b, t, d).bfloat16(), dt, A, normal(d, p, 2), normal(d), normal(b, d, p, 2)]


def timed(implementation: str, shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    sets = [inputs(shape, seed) for seed in range(3)]
    leaves = [[a.clone().requires_grad_() for a in given] for given in sets]

    def both(given: list[Tensor]) -> None:
        y, _ = diagonal_ssm.parallel(*given, implementation=implementation)
        torch.autograd.grad(y, given, torch.ones_like(y))

    with torch.no_grad():
        forward = median_ms([lambda g=given: diagonal_ssm.parallel(*g, implementation=implementation) for given in sets], "cuda", repeats)
    together = median_ms([lambda g=given: both(g) for given in leaves], "cuda", repeats)
    peak = peak_bytes(lambda: both(leaves[0]), "cuda")
    return {"shape": shape, "by": implementation, "forward_ms": forward, "both_ms": together, "peak_bytes": peak}


def errors(implementation: str) -> dict[str, float]:
    """‖a − exact‖ / ‖exact‖ of y, the final state and every gradient."""
    given, found = inputs(CHECKED, 9), []
    for dtype, how in ((None, implementation), (torch.float64, "plain")):
        leaves = [(a if dtype is None else a.to(dtype)).detach().clone().requires_grad_() for a in given]
        y, state = diagonal_ssm.parallel(*leaves, implementation=how)
        upstream = [torch.randn(o.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda") for o in (y, state)]
        found.append(
            [y, state, *torch.autograd.grad([y, state], leaves, [g.to(o.dtype) for g, o in zip(upstream, (y, state), strict=True)])]
        )
    names = ["y", "final", *(f"d{name}" for name in PARTS)]
    return {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(names, *found, strict=True)}


def trained(name: str, compiled: bool, flops: float, lock: str = LOCK, graphs: bool = False) -> dict[str, Any]:
    """Tokens a second; MFU: 6 operations a parameter and token, but embeddings that are only looked up, of a matmul's measured rate."""
    mamba = preset("mamba-130m")
    config, (batch, length) = nearest("lat", count_params(mamba), mamba.vocab_size) if name == MATCHED else preset(name), MODELS[name]
    row = scan.training("auto", STEPS, compiled, config, batch, length, lock, graphs)
    mfu = operations(config) * row["tokens_per_s"] / flops
    return {"model": name, "compiled": compiled, "graphs": graphs, "batch": batch, "length": length, **row, "mfu": mfu}


def all_compiled(names: list[str], flops: float, graphs: bool, lock: str) -> Iterator[dict[str, Any]]:
    """`trained`, each in a process of its own: they compile, for minutes, at once. graphs: with CUDA graphs and without."""
    command = [sys.executable, "-m", "unisono_tools.bench.ssm", "--lock", lock, "--flops", str(flops), "--one"]
    each = [[*command, name, *more] for more in ([], ["--graphs"])[: 1 + graphs] for name in names]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for arguments in each]
    for process in running:
        said, _ = process.communicate()
        if process.returncode == 0:  # what went wrong with another stands in the terminal
            yield json.loads(said.splitlines()[-1])


def transformers_slow_path() -> dict[str, Any]:
    """Mamba of transformers, whose fast path wants CUDA extensions that are built where they run; under autocast."""
    from transformers import MambaConfig, MambaForCausalLM  # pyright: ignore[reportMissingImports]

    model = MambaForCausalLM(MambaConfig(vocab_size=preset("mamba-130m").vocab_size, num_hidden_layers=24)).cuda()
    tokens = torch.randint(0, 50000, (SLOW[0], SLOW[1] + 1), device="cuda")

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return scan.trained(model, loss, tokens, 1)


def beside_transformers(flops: float) -> list[dict[str, Any]]:
    """mamba-130m on few tokens, in transformers and here."""
    mfu = operations(preset("mamba-130m")) / flops
    named = {
        "mamba-130m in transformers, slow path": transformers_slow_path,
        "mamba-130m": lambda: scan.training("auto", STEPS, False, preset("mamba-130m"), *SLOW),
    }
    rows = []
    for name, run in named.items():
        row = run()
        rows.append({"model": name, "compiled": False, "batch": SLOW[0], "length": SLOW[1], **row, "mfu": mfu * row["tokens_per_s"]})
        torch.cuda.empty_cache()
    return rows


def ratios(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float, float, None]]:
    """Of each shape what plain operations take over what kernels do."""
    for row, plain in ((a, b) for a in rows for b in rows if b["by"] == "plain" != a["by"] and a["shape"] == b["shape"]):
        shape = ", ".join(map(str, row["shape"]))
        for name, what in (("forward_ms", "forward"), ("both_ms", "forward and backward")):
            yield f"{shape}: {what}, times as fast as plain", plain[name] / row[name], FASTER, None


def made(row: dict[str, Any]) -> str:
    """What a table says after a model's name."""
    return ", compiled" * row["compiled"] + ", CUDA graphs" * row.get("graphs", False)


def of_lat(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float, float, None]]:
    """What mamba-130m makes of the tokens a second of a LAT as large."""
    for row, lat in ((a, b) for a in rows for b in rows if (a["model"], b["model"]) == ("mamba-130m", MATCHED)):
        if all(row.get(name) == lat.get(name) for name in ("compiled", "graphs", "batch", "length")):
            yield f"mamba-130m{made(row)}: of the tokens/s of {MATCHED}", row["tokens_per_s"] / lat["tokens_per_s"], HALF, None


def markdown(result: dict[str, Any]) -> str:
    title = "S4D's recurrence on a GPU" if result["ops"] else "Mamba, S4D and MARU in training on a GPU"
    title += ", and models in training" if result["ops"] and result["training"] else ""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    lines += [f"- bf16 matmul at {result['ceilings']['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s; inputs in bfloat16", ""]
    if result["ops"]:
        lines += ["| B, T, D, pairs | by | forward ms | forward and backward ms | peak MiB |", "|---|---|---|---|---|"]
        for row in result["ops"]:
            shape = ", ".join(map(str, row["shape"]))
            lines.append(f"| {shape} | {row['by']} | {row['forward_ms']:.3f} | {row['both_ms']:.2f} | {row['peak_bytes'] / 2**20:.0f} |")
        lines += ["", *report.marks(ratios(result["ops"]), ".1f")]
        shown = ", ".join(f"{name} {value:.1e}" for name, value in result["errors"].items())
        lines += ["", f"Errors of the kernel against float64, ‖a − exact‖ / ‖exact‖, at {', '.join(map(str, CHECKED))}: {shown}.", ""]
    if result["training"]:
        lines += ["Training in bfloat16, parameters in float32, AdamW; MFU: 6 operations a parameter and token, of the matmul's rate.", ""]
        lines += ["| model | tokens a step | tokens/s | MFU | peak GiB | first two steps, s |", "|---|---|---|---|---|---|"]
        for row in result["training"]:
            name = row["model"] + made(row)
            figures = f"{row['tokens_per_s']:,.0f} | {row['mfu']:.1%} | {row['peak_bytes'] / 2**30:.1f}"
            lines.append(f"| {name} | {row['batch']} × {row['length']} | {figures} | {row['first_s']:.0f} |")
        shares = list(of_lat(result["training"]))
        lines += ["", *report.marks(shares)] if shares else []
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="unisono_tools.bench.ssm", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="to train; none: the op alone")
    parser.add_argument("--alone", action="store_true", help="without plain operations and transformers, which take minutes")
    parser.add_argument("--training", action="store_true", help="models alone")
    parser.add_argument(
        "--compiled", nargs="*", default=[], choices=list(MODELS), help="models to train compiled, too: minutes, all at once"
    )
    parser.add_argument("--graphs", action="store_true", help="each as a CUDA graph, too: its host launches nothing")
    parser.add_argument("--one", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--flops", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--lock", default=LOCK, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    if options.one:
        print(json.dumps(trained(options.one, True, options.flops, options.lock, options.graphs)))
        return 0
    command = shlex.join(["python", "-m", "unisono_tools.bench.ssm", *(sys.argv[1:] if argv is None else argv)])
    result: dict[str, Any] = {
        "run": report.about(command, torch.cuda.get_device_name(), "unisono", "torch", "triton", "transformers"),
        "ceilings": ceilings("cuda"),
        "ops": []
        if options.training
        else [
            timed(how, shape, 3 if how == "plain" else 7)
            for shape in SHAPES
            for how in serving("torch", "diagonal_ssm", "cuda", "bfloat16", {"P": shape[-1]})
            if how != "plain" or not options.alone
        ],
        "errors": {} if options.training else errors("triton"),
        "training": [],
    }
    flops = result["ceilings"]["matmul_flop_per_s"]

    def eager() -> Iterator[dict[str, Any]]:
        for graphs in (False, True)[: 1 + options.graphs]:
            for name in options.models:
                yield trained(name, False, flops, options.lock, graphs)
                gc.collect()
                torch.cuda.empty_cache()

    for row in itertools.chain(eager(), all_compiled(options.compiled, flops, options.graphs, options.lock)):
        result["training"].append(row)
        print(row, flush=True)
        report.keep(options.output, result, markdown(result))
    if options.models and importlib.util.find_spec("transformers") is not None and not options.alone:
        result["training"] += beside_transformers(flops)
    report.keep(options.output, result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
