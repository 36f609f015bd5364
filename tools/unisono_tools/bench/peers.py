"""Layers on a CPU beside their peers, in one process: `python -m unisono_tools.bench.peers --output docs/results/peers-cpu`

The fastest of several forwards alone, and of forwards plus backwards, the contestants in turns: what else runs on a machine only slows.
Ratios are a peer's time over PyTorch's unisono. Peers that are not installed are left out: flash-linear-attention's naive references and
transformers come with the extra `oracles`, JAX with `jax`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unisono_torch
from torch import Tensor
from torch.nn import functional as F
from unisono_spec.contract import Config, init_params, preset
from unisono_torch.ops import linear_attention, mom_gru
from unisono_torch.ops.features import elu1

from unisono_tools.bench.contestants import serving
from unisono_tools.bench.report import about, ready

HEADS, WIDTH = 4, 64
OURS, JAX = "unisono, PyTorch", "unisono, JAX"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """train: forward and backward, of the mean square of the output. forward: yields its result, without a gradient. same: computes what
    ours does."""

    train: Callable[[], object]
    forward: Callable[[], Any]
    same: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """forward_ms, ms: the fastest forward alone, and the fastest of both ways. error: ‖o − exact‖ / ‖exact‖ against float64; None for
    what computes something else."""

    contestant: str
    forward_ms: float
    ms: float
    error: float | None


Contestants = dict[str, Contestant]


def _torch(call: Callable[[], Tensor], same: bool = True) -> Contestant:
    return Contestant(lambda: call().square().mean().backward(), torch.no_grad()(call), same)


def _jax(function: Callable[..., Any], *arguments: Any) -> Contestant:
    """`function` of arrays or trees of them, all of which are differentiated."""
    jax = importlib.import_module("jax")
    forward = jax.jit(function)
    gradient = jax.jit(jax.value_and_grad(lambda given: (function(*given) ** 2).mean()))
    given = jax.tree.map(jax.numpy.asarray, arguments)
    return Contestant(lambda: jax.block_until_ready(gradient(given)), lambda: jax.block_until_ready(forward(*given)))


def attention(batch: int, length: int, dtype: torch.dtype) -> Contestants:
    """Causal linear attention with elu1 beside a quadratic layer of equal width."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, length, HEADS, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    zero = torch.zeros(batch, HEADS, WIDTH, WIDTH, dtype=dtype), torch.zeros(batch, HEADS, WIDTH, dtype=dtype)
    found = {OURS: _torch(lambda: linear_attention.parallel(elu1(q), elu1(k), v, zero)[0])}
    if dtype == torch.float64:
        return found
    found["torch SDPA (softmax, quadratic)"] = _torch(
        lambda: F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), is_causal=True).transpose(1, 2),  # pyright: ignore
        same=False,
    )
    if importlib.util.find_spec("fla"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what fla's kernels would like to find
            naive = importlib.import_module("fla.ops.linear_attn.naive")
        found["fla naive chunk"] = _torch(lambda: naive.naive_chunk_linear_attn(elu1(q), elu1(k), v, scale=1.0, normalize=True))
    if serving("jax", "linear_attention", "cpu", "float32"):
        ops = importlib.import_module("unisono_jax.ops.linear_attention")
        phi = importlib.import_module("unisono_jax.ops.features").elu1
        start = tuple(a.numpy() for a in zero)
        given = (a.detach().numpy() for a in (q, k, v))
        found[JAX] = _jax(lambda q, k, v: ops.parallel(phi(q), phi(k), v, start)[0], *given)
    return found


def mamba(batch: int, length: int, dtype: torch.dtype) -> Contestants:
    """A model of one block of width 128, with the same weights everywhere."""
    config = preset("mamba-1m", d_model=128, n_layers=1)
    params = init_params(config, 0)
    tokens = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    ours = _model(config, params, dtype)
    found = {OURS: _torch(lambda: ours(tokens)[0])}
    if dtype == torch.float64:
        return found
    if importlib.util.find_spec("transformers"):
        from transformers import MambaConfig, MambaForCausalLM  # pyright: ignore[reportMissingImports]

        theirs = MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=128, num_hidden_layers=1, layer_norm_epsilon=1e-6))
        names = {name: f"backbone.{name.replace('embedding.', 'embeddings.')}" for name in params} | {
            "norm.weight": "backbone.norm_f.weight"
        }
        theirs.load_state_dict({names[name]: torch.tensor(p) for name, p in params.items()}, strict=False)  # the head is tied
        found["transformers, slow path"] = _torch(lambda: theirs(tokens, use_cache=False).logits)
    if serving("jax", "selective_scan", "cpu", "float32"):
        make, weights = importlib.import_module("unisono_tools.backends.jax").functional(
            importlib.import_module("unisono_jax").create(config, params, dtype="float32")
        )
        found[JAX] = _jax(lambda named: make(named).forward(tokens.numpy())[0], weights)
    return found


def cell(batch: int, length: int, dtype: torch.dtype) -> Contestants:
    """MoM-GRU of MARU's 1M preset beside a loop over tokens that autograd records."""
    config = preset("maru-1m", n_layers=1)
    params = init_params(config, 0)
    model = _model(config, params, dtype)
    p = dict(model.layers[0].cell.named_parameters())
    x = torch.randn(batch, length, 144, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    start = torch.zeros(batch, 144, dtype=dtype), p["memory"].expand(batch, *p["memory"].shape)
    found = {OURS: _torch(lambda: mom_gru.hoisted(x, p, start)[0])}
    if dtype == torch.float64:
        return found
    found["eager loop"] = _torch(lambda: mom_gru.recurrent(x, p, start)[0])
    if serving("jax", "mom_gru", "cpu", "float32"):
        ops, jnp = importlib.import_module("unisono_jax.ops.mom_gru"), importlib.import_module("jax.numpy")
        inside = "layers.0.cell."
        given = {name.removeprefix(inside): a for name, a in params.items() if name.startswith(inside)}

        def run(x: Any, p: Any) -> Any:
            memory = jnp.broadcast_to(p["memory"], (batch, *p["memory"].shape))
            return ops.hoisted(x, p, (jnp.zeros((batch, 144)), memory))[0]

        found[JAX] = _jax(run, x.detach().numpy(), given)
    return found


def _model(config: Config, params: dict[str, np.ndarray], dtype: torch.dtype) -> Any:
    name = str(dtype).removeprefix("torch.")
    return unisono_torch.create(config, params, dtype=name, param_dtype=name)


CASES: dict[str, tuple[Callable[[int, int, torch.dtype], Contestants], int, int]] = {
    "linear attention, B 1, T 512, 4 heads of 64": (attention, 1, 512),
    "linear attention, B 1, T 4096, 4 heads of 64": (attention, 1, 4096),
    "Mamba block, B 4, T 128, D 128": (mamba, 4, 128),
    "Mamba block, B 4, T 512, D 128": (mamba, 4, 512),
    "MoM-GRU, B 8, T 128, D 144, 4 banks of 64 × 16": (cell, 8, 128),
}


def measure(contestants: Contestants, exact: np.ndarray, repeats: int) -> list[Row]:
    """In turns, so that what disturbs the machine disturbs them all."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contestants}
    outputs = {}
    for repeat in range(repeats + 1):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            outputs[name] = contestant.forward()
            middle = time.perf_counter()
            contestant.train()
            if repeat:  # the first warms up
                for kept, seconds in zip(times[name], (middle - start, time.perf_counter() - middle), strict=True):
                    kept.append(1e3 * seconds)
    errors = {name: np.linalg.norm(np.asarray(o, np.float64) - exact) / np.linalg.norm(exact) for name, o in outputs.items()}
    rows = []
    for name, (forward, both) in times.items():
        rows.append(Row(name, min(forward), min(both), float(errors[name]) if contestants[name].same else None))
    return rows


def markdown(run: dict[str, str], found: dict[str, list[Row]]) -> str:
    lines = ["# Layers beside their peers on a CPU", "", *(f"- {name}: {value}" for name, value in run.items()), ""]
    lines += [
        "The fastest forward without gradients, and the fastest forward and backward; × ours: a peer's time over the first row's; error:",
        "‖o − exact‖ / ‖exact‖, exact in float64.",
        "",
    ]
    lines += ["| layer | contestant | forward ms | × ours | both ms | × ours | error |", "|---" * 7 + "|"]
    for name, rows in found.items():
        for row in rows:
            error = "–" if row.error is None else f"{row.error:.1e}"
            cells = [f"{v:.1f} | {v / ours:.2f}" for v, ours in ((row.forward_ms, rows[0].forward_ms), (row.ms, rows[0].ms))]
            lines.append(f"| {name} | {row.contestant} | {' | '.join(cells)} | {error} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json and .md are added")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    ready(parser, options.output)
    torch.set_num_threads(options.threads)
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it finds processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    found, begun = {}, os.getloadavg()[0]
    for name, (make, batch, length) in CASES.items():
        exact = make(batch, length, torch.float64)[OURS].forward().numpy()
        found[name] = measure(make(batch, length, torch.float32), exact, options.repeats)
        print(name, {row.contestant: (round(row.forward_ms, 1), round(row.ms, 1)) for row in found[name]}, flush=True)
    command = f"python -m unisono_tools.bench.peers --repeats {options.repeats} --threads {options.threads}"
    run = about(command, f"{options.threads} thread(s)", "torch", "jax", "fla-core", "transformers")
    run["load"] = f"{begun:.1f} when it began, {os.getloadavg()[0]:.1f} when it ended"
    print(markdown(run, found))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"run": run, "cases": {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()}}
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(run, found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
