"""Mamba's selective scan: kernel and plain operations, and a model trained by each.

python -m unisono_tools.bench.scan --output docs/results/kernels-scan-h100      # needs a GPU; writes .json and .md
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import importlib.util
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import unisono_torch
from torch import Tensor
from unisono_spec.contract import Config, preset
from unisono_torch.ops import gated_scan

from unisono_tools.backends.torch.compiling import compile_step
from unisono_tools.backends.torch.graphs import Graphed
from unisono_tools.bench import report
from unisono_tools.bench.contestants import serving
from unisono_tools.bench.measure import LOCK, ceilings, held, median_ms, peak_bytes, throughput_ms

# B, T, D, N; bfloat16, with softplus, D and a gate
SHAPES = ((8, 4096, 1536, 16), (1, 16384, 1536, 16), (8, 4000, 1300, 16), (8, 4001, 1301, 16))
PLAIN = SHAPES[:1]  # of which plain operations are timed, too
MARKS = {"forward_ms": (0.65, 0.45), "both_ms": (2.5, 1.8)}  # of the first shape, in ms: must, aim
CHECKED = (2, 501, 203, 16)  # errors are measured here, against float64
SETS = 3
EXP2 = 16  # a clock and multiprocessor (CUDA C++ programming guide, table of arithmetic throughput)
MODEL, BATCH, LENGTH = "mamba-130m", 8, 2048
NAMES = ("u", "dt", "A", "B", "C", "D", "state", "z")


def inputs(shape: tuple[int, int, int, int], seed: int) -> list[Tensor]:
    """By the order of NAMES: Δ between e^−5 and e^−1 for most."""
    b, t, d, n = shape
    made = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=made, device="cuda").to(dtype)

    narrow = torch.bfloat16
    u, z, dt = normal(b, t, d, dtype=narrow), normal(b, t, d, dtype=narrow), (normal(b, t, d) - 3).to(narrow)
    B, C = normal(b, t, n, dtype=narrow), normal(b, t, n, dtype=narrow)
    return [u, dt, -normal(d, n).exp(), B, C, normal(d), normal(b, d, n), z]


def scan(given: list[Tensor], implementation: str) -> tuple[Tensor, Tensor]:
    u, dt, A, B, C, D, state, z = given
    return gated_scan.parallel(u, dt, A, B, C, D, state, z=z, implementation=implementation)


def mamba_ssm(given: list[Tensor]) -> Tensor:
    """The published CUDA kernel, (B, D, T) as it takes it; transposes are not timed."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    u, dt, A, B, C, D, _, z = given
    return selective_scan_fn(*(a.mT for a in (u, dt)), A, *(a.mT for a in (B, C)), D, z.mT, None, True)


def timed(call: Callable[[list[Tensor]], Any], shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    """Median ms forward without gradients, and forward and backward together; bytes beyond the inputs."""
    sets = [inputs(shape, seed) for seed in range(SETS)]
    leaves = [[a.clone().requires_grad_() for a in given] for given in sets]

    def both(given: list[Tensor]) -> None:
        out = call(given)
        y = out if isinstance(out, Tensor) else out[0]
        torch.autograd.grad(y, given, torch.ones_like(y), allow_unused=True)

    with torch.no_grad():
        forward = median_ms([lambda g=given: call(g) for given in sets], "cuda", repeats)
    together = median_ms([lambda g=given: both(g) for given in leaves], "cuda", repeats)
    return {"forward_ms": forward, "both_ms": together, "peak_bytes": peak_bytes(lambda: both(leaves[0]), "cuda")}


def jla(shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    """jax-linear-attention's mamba1, in JAX, whose calls are timed by the host, a round at once."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax, ops = importlib.import_module("jax"), importlib.import_module("jla.ops")
    sets = [tuple(jax.dlpack.from_dlpack(a.contiguous()) for a in inputs(shape, seed)) for seed in range(SETS)]

    def forward(u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, state: Any, z: Any) -> Any:
        return ops.linear_attention("mamba1", C, B, u, dt=dt, a=A, d=D, z=z, dt_softplus=True, initial_state=state)[0]

    def both(upstream: Any, *given: Any) -> Any:
        y, pull = jax.vjp(forward, *given)
        return y, pull(upstream)

    one, two = jax.jit(forward), jax.jit(both)
    return {
        "forward_ms": throughput_ms([lambda a=a: one(*a) for a in sets], jax.block_until_ready, repeats),
        "both_ms": throughput_ms([lambda a=a: two(a[0], *a) for a in sets], jax.block_until_ready, repeats),
        "peak_bytes": None,
    }


def errors(implementation: str) -> dict[str, float]:
    """‖a − exact‖ / ‖exact‖ of y, the final state and every gradient."""
    given = inputs(CHECKED, 9)
    found = []
    for dtype, how in ((None, implementation), (torch.float64, "plain")):
        leaves = [(a if dtype is None else a.to(dtype)).detach().clone().requires_grad_() for a in given]
        y, state = scan(leaves, how)
        upstream = [torch.randn(o.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16() for o in (y, state)]
        gradients = torch.autograd.grad([y, state], leaves, [g.to(o.dtype) for g, o in zip(upstream, (y, state), strict=True)])
        found.append([y.detach(), state.detach(), *gradients])
    names = ["y", "final", *(f"d{name}" for name in NAMES)]
    return {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(names, *found, strict=True)}


def training(
    implementation: str,
    steps: int,
    compiled: bool,
    config: Config,
    batch: int = BATCH,
    length: int = LENGTH,
    lock: str = LOCK,
    graphs: bool = False,
) -> dict[str, Any]:
    """Tokens a second of training steps: forward, cross-entropy, backward, AdamW; bfloat16, float32 parameters. Compiled, and by graphs
    replayed as a CUDA graph, as `train` does."""
    torch.manual_seed(0)
    model = unisono_torch.create(config, seed=0, dtype="bfloat16", device="cuda", implementation=implementation)
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), device="cuda")

    def loss(tokens: Tensor) -> Tensor:
        logits, _ = model(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return trained(model, compile_step(loss, config, tokens.device) if compiled else loss, tokens, steps, lock, graphs)


def trained(
    model: torch.nn.Module, loss: Callable[[Tensor], Tensor], tokens: Tensor, steps: int, lock: str = LOCK, graphs: bool = False
) -> dict[str, Any]:
    """Median tokens a second of `steps` on `tokens` [B, T + 1], after three beside others that compile: nothing else runs meanwhile.
    Memory at the peak is of all steps but the first; a graph's, of what the second records."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    graphed = Graphed(lambda given: (loss(given["tokens"]),), list(model.parameters()))

    def step() -> None:
        if graphs:
            graphed({"tokens": tokens}, 1.0, first=True, last=True)
        else:
            loss(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    with held(lock, fcntl.LOCK_SH):
        torch.cuda.reset_peak_memory_stats()  # of models before
        begin = time.perf_counter()
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        first, times = time.perf_counter() - begin, []
        step()
        torch.cuda.synchronize()
    with held(lock, fcntl.LOCK_EX):
        for _ in range(steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    rate = tokens[:, 1:].numel() / statistics.median(times)
    return {"tokens_per_s": rate, "peak_bytes": torch.cuda.max_memory_allocated(), "first_s": first}


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Mamba's selective scan on a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in result["run"].items()]
    lines += [
        f"- copy at {result['ceilings']['copy_bytes_per_s'] / 1e12:.2f} TB/s, read plus written",
        "- bfloat16, with softplus, D and the gate; floors of the forward: u, Δ, z and y once at that speed; an exp2 a state at 16 a clock",
        "",
        "| B, T, D, N | by | forward ms | of the copy floor | of the exp2 floor | forward and backward ms | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["scans"]:
        shares = " | ".join(f"{floor / row['forward_ms']:.0%}" for floor in (row["copy_ms"], row["exp2_ms"]))
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        shape = ", ".join(map(str, row["shape"]))
        lines.append(f"| {shape} | {row['by']} | {row['forward_ms']:.3f} | {shares} | {row['both_ms']:.2f} | {peak} |")
    first = result["scans"][0]
    named = {"forward_ms": "forward, ms", "both_ms": "forward and backward, ms"}
    shape = ", ".join(map(str, first["shape"]))
    lines += ["", f"Marks at {shape}:", "", *report.marks(((named[name], first[name], *MARKS[name]) for name in MARKS), ".3f")]
    shown = ", ".join(f"{name} {value:.1e}" for name, value in result["errors"].items())
    lines += ["", f"Errors of the kernel against float64, ‖a − exact‖ / ‖exact‖, at B, T, D, N of {', '.join(map(str, CHECKED))}: {shown}."]
    lines += ["", f"{MODEL} in training, {BATCH} × {LENGTH} tokens a step, bfloat16, AdamW:", ""]
    lines += ["| by | tokens/s | peak GiB |", "|---|---|---|"]
    lines += [f"| {row['by']} | {row['tokens_per_s']:,.0f} | {row['peak_bytes'] / 2**30:.1f} |" for row in result["training"]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="unisono_tools.bench.scan", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--alone", action="store_true", help="without peers, one of which compiles for minutes")
    parser.add_argument("--compiled", action="store_true", help="train compiled, too: minutes")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    properties = torch.cuda.get_device_properties(0)
    clock = 1e3 * getattr(properties, "clock_rate", 1_980_000)  # Hz
    peers: dict[str, Callable[[list[Tensor]], Any]] = {}
    if importlib.util.find_spec("mamba_ssm") is not None and not options.alone:
        peers["mamba_ssm"] = mamba_ssm
    command = "python -m unisono_tools.bench.scan" + " --alone" * options.alone + " --compiled" * options.compiled
    result: dict[str, Any] = {
        "run": report.about(
            command, torch.cuda.get_device_name(), "unisono", "torch", "triton", "mamba-ssm", "jax", "jax-linear-attention"
        ),
        "ceilings": ceilings("cuda"),
        "scans": [],
        "errors": errors("triton"),
        "training": [],
    }
    for shape in SHAPES:
        b, t, d, n = shape
        floors = {
            "copy_ms": 1e3 * 4 * 2 * b * t * d / result["ceilings"]["copy_bytes_per_s"],
            "exp2_ms": 1e3 * b * t * d * n / (EXP2 * properties.multi_processor_count * clock),
        }
        ours = serving("torch", "selective_scan", "cuda", "bfloat16", {"N": n})
        timed_here = {how: functools.partial(scan, implementation=how) for how in ours if how != "plain" or shape in PLAIN} | peers
        for name, call in timed_here.items():
            repeats = 1 if name == "plain" else options.repeats
            result["scans"].append({"shape": shape, "by": name, **floors, **timed(call, shape, repeats)})
            print(result["scans"][-1], flush=True)
        report.keep(options.output, result, markdown(result))
    for compiled in (False, True) if options.compiled else (False,):
        for implementation in ("auto", "plain"):
            if compiled and implementation == "plain":
                continue  # an hour
            by = {"auto": "kernel", "plain": "plain operations"}[implementation] + (", compiled" if compiled else "")
            result["training"].append({"by": by, **training(implementation, options.steps, compiled, preset(MODEL))})
            print(result["training"][-1], flush=True)
            report.keep(options.output, result, markdown(result))
    if importlib.util.find_spec("jla") is not None and not options.alone:
        # last: compiling its gradient takes minutes
        first = {name: result["scans"][0][name] for name in ("shape", "copy_ms", "exp2_ms")}
        result["scans"].insert(1, {**first, "by": "jax-linear-attention", **jla(SHAPES[0], options.repeats)})
        print(result["scans"][1], flush=True)
    report.keep(options.output, result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
