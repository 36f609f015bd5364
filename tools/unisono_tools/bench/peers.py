"""Layers on a CPU beside their peers, in one process: `python -m unisono_tools.bench.peers --output docs/results/peers-cpu`

Medians of forward plus backward; ratios are a peer's time over ours. Peers that are not installed are left out: flash-linear-attention's
naive references and transformers come with the extra `oracles`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import unisono_torch
from torch.nn import functional as F
from unisono_spec.contract import preset
from unisono_torch.ops import linear_attention, mom_gru
from unisono_torch.ops.features import elu1

Call = Callable[[], torch.Tensor]
HEADS, WIDTH = 4, 64


def attention(batch: int, length: int) -> dict[str, Call]:
    """Causal linear attention with elu1 beside a quadratic layer of equal width."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, length, HEADS, WIDTH, generator=draw, requires_grad=True) for _ in range(3))
    zero = torch.zeros(batch, HEADS, WIDTH, WIDTH), torch.zeros(batch, HEADS, WIDTH)
    calls: dict[str, Call] = {
        "unisono": lambda: linear_attention.parallel(elu1(q), elu1(k), v, zero)[0],
        "torch SDPA (softmax, quadratic)": lambda: F.scaled_dot_product_attention(
            *(a.transpose(1, 2) for a in (q, k, v)),  # pyright: ignore[reportArgumentType]
            is_causal=True,
        ),
    }
    if importlib.util.find_spec("fla"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what fla's kernels would like to find
            naive = importlib.import_module("fla.ops.linear_attn.naive")
        calls["fla naive chunk"] = lambda: naive.naive_chunk_linear_attn(elu1(q), elu1(k), v, scale=1.0, normalize=True)
    return calls


def mamba(batch: int, length: int) -> dict[str, Call]:
    """One block of width 128."""
    tokens = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    ours: Any = unisono_torch.create(preset("mamba-1m", d_model=128, n_layers=1))
    calls: dict[str, Call] = {"unisono": lambda: ours(tokens)[0]}
    if importlib.util.find_spec("transformers"):
        from transformers import MambaConfig, MambaForCausalLM  # pyright: ignore[reportMissingImports]

        theirs = MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=128, num_hidden_layers=1))
        calls["transformers, slow path"] = lambda: theirs(tokens, use_cache=False).logits
    return calls


def cell(batch: int, length: int) -> dict[str, Call]:
    """MoM-GRU of MARU's 1M preset beside a loop over tokens that autograd records."""
    model: Any = unisono_torch.create(preset("maru-1m", n_layers=1))
    p = dict(model.layers[0].cell.named_parameters())
    x = torch.randn(batch, length, 144, generator=torch.Generator().manual_seed(0), requires_grad=True)
    start = torch.zeros(batch, 144), p["memory"].expand(batch, *p["memory"].shape)
    return {"unisono": lambda: mom_gru.hoisted(x, p, start)[0], "eager loop": lambda: mom_gru.recurrent(x, p, start)[0]}


CASES: dict[str, tuple[Callable[[int, int], dict[str, Call]], int, int]] = {
    "linear attention, B 1, T 512, 4 heads of 64": (attention, 1, 512),
    "linear attention, B 1, T 4096, 4 heads of 64": (attention, 1, 4096),
    "Mamba block, B 4, T 512, D 128": (mamba, 4, 512),
    "MoM-GRU, B 8, T 128, D 144, 4 banks of 64 × 16": (cell, 8, 128),
}


def milliseconds(call: Call, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        call().square().mean().backward()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def markdown(run: dict[str, str], found: dict[str, dict[str, float]]) -> str:
    lines = ["# Layers beside their peers on a CPU", "", *(f"- {name}: {value}" for name, value in run.items()), ""]
    lines += ["| layer | contestant | forward and backward, ms | × ours |", "|---|---|---|---|"]
    for name, times in found.items():
        lines += [f"| {name} | {who} | {ms:.1f} | {ms / times['unisono']:.2f} |" for who, ms in times.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json and .md are added")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = {}
    for name, (make, batch, length) in CASES.items():
        found[name] = {who: milliseconds(call, options.repeats) for who, call in make(batch, length).items()}
        print(name, {who: round(ms, 1) for who, ms in found[name].items()}, flush=True)
    versions = [
        f"{n} {importlib.metadata.version(n)}" for n in ("torch", "fla-core", "transformers") if importlib.util.find_spec(n.split("-")[0])
    ]
    run = {
        "command": f"python -m unisono_tools.bench.peers --repeats {options.repeats} --threads {options.threads}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{options.threads} thread(s) of {platform.processor() or platform.machine()}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
    }
    print(markdown(run, found))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps({"run": run, "milliseconds": found}, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(run, found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
