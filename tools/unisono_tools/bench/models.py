"""Whole models in training beside the Transformer: `python -m unisono_tools.bench.models --output docs/results/models-h100`, on a GPU.

Models of one number of parameters (`unisono match`) on 64K tokens a step, in sequences of more and more tokens: forward, cross-entropy,
backward, AdamW; bfloat16 with parameters in float32, without dropout, the loss compiled whole. And what it takes to read a long prompt.

Heads are matched, too (`unisono match --heads alike`): at 70M parameters of 50,257 ids each has one of its own beside the embedding, at
152M one table serves both. `--heads usual` gives InfinityFormer one table at 70M as well, as its preset has, so that it computes with half
as many parameters more than the Transformer; `tied` gives one to all.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import unisono_torch
from torch import Tensor
from torch.nn import functional as F
from unisono_spec.contract import Config, count_params

from unisono_tools.bench import report
from unisono_tools.bench.measure import LOCK, ceilings, held
from unisono_tools.experiments.match import HEADS, nearest

BASE, MODELS = "transformer", ("transformer", "lat", "infinityformer")
VOCABULARY, TOKENS = 50257, 1 << 16
SIZES, LENGTHS = (70_400_000, 152_000_000), (2048, 8192, 16384, 65536)
PROMPTS = (1 << 14, 1 << 17, 1_000_000)
TITLES = {"alike": "heads alike, ", "usual": "", "tied": "one table for embedding and head, ", "own": "heads of their own, "}
Row = dict[str, Any]


def operations(config: Config) -> int:
    """Of a training step and token: 6 a parameter, but for embeddings that are only looked up. What mixers do beside is not counted."""
    looked_up = {"embedding.weight"} if not getattr(config, "tie_head", False) else set()
    return 6 * sum(math.prod(p.shape) for name, p in config.params().items() if name not in looked_up)


def trainer(config: Config, device: str, compiled: bool, logits: bool = False) -> Callable[[Tensor], Tensor]:
    """tokens [B, T+1] → the loss, and a step of AdamW. logits: the loss is PyTorch's, of logits that are kept."""
    torch.manual_seed(0)
    model = unisono_torch.create(config, seed=0, dtype="bfloat16", device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss(tokens: Tensor) -> Tensor:
        given, targets = tokens[:, :-1], tokens[:, 1:]
        if logits:
            return F.cross_entropy(model(given)[0].flatten(0, 1).float(), targets.flatten())
        return model.nats(given, targets)[0] / targets.numel()

    # one graph a length, or an error
    function: Any = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss

    def step(tokens: Tensor) -> Tensor:
        found = function(tokens)
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.detach()

    return step


def trained(
    name: str, size: int, lengths: list[int], tokens: int, compiled: bool, steps: int, lock: str, logits: bool = False, head: str = "alike"
) -> None:
    """Prints a row of JSON for each length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = nearest(name, size, VOCABULARY, head)
    step = trainer(config, device, compiled, logits)
    for length in lengths:
        batch = max(1, tokens // length)
        given = torch.randint(0, VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
        with held(lock, fcntl.LOCK_SH):
            begin = time.perf_counter()
            losses = [float(step(given)), float(step(given))]
            first, times = time.perf_counter() - begin, list[float]()
        if device == "cuda":
            torch.cuda.empty_cache()  # what others need to compile in
            torch.cuda.reset_peak_memory_stats()
        with held(lock, fcntl.LOCK_EX):
            for _ in range(steps):
                begin = time.perf_counter()
                losses.append(float(step(given)))  # the host waits for the number
                times.append(time.perf_counter() - begin)
        row = {
            "model": name, "size": size, "head": head, "parameters": count_params(config), "length": length, "batch": batch,
            "compiled": compiled, "tokens_per_s": batch * length / statistics.median(times), "first_s": first, "losses": losses,
            "operations": operations(config), "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }  # fmt: skip
        print(json.dumps({**row, "logits": True} if logits else row), flush=True)


def prompted(name: str, size: int, prompts: list[int], lock: str, head: str = "alike") -> None:
    """Prints a row of JSON for each prompt: what reading it takes, as `generate` does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = unisono_torch.create(nearest(name, size, VOCABULARY, head), seed=0, dtype="bfloat16", device=device)
    for length in prompts:
        prompt = np.random.default_rng(0).integers(0, VOCABULARY, (1, length))
        with held(lock, fcntl.LOCK_SH):
            model.generate(prompt[:, :1024], 1)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with held(lock, fcntl.LOCK_EX):
            begin = time.perf_counter()
            model.generate(prompt, 1)
            seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        row = {"model": name, "size": size, "head": head, "prompt": length, "seconds": seconds, "peak_bytes": peak}
        print(json.dumps(row), flush=True)


def _head(row: Row) -> str:
    return row.get("head", "usual")  # rows of older pages do not say


def _kinds(rows: list[Row]) -> list[tuple[int, str]]:
    return sorted({(row["size"], _head(row)) for row in rows}, key=lambda kind: (kind[0], HEADS.index(kind[1])))


def _told_apart(size: int, heads: list[str], names: Sequence[str] = MODELS) -> list[str]:
    """Those of `heads` by which some model of this size is another one."""
    found: dict[tuple[Config, ...], str] = {}
    for head in heads:
        found.setdefault(tuple(nearest(name, size, VOCABULARY, head) for name in names), head)
    return list(found.values())


def _of_logits(rows: list[Row]) -> list[str]:
    """What keeping the logits costs, where the same model was trained without, too."""
    lines = [
        "",
        "## With logits kept",
        "",
        "PyTorch's loss, of logits that stand in memory, beside that of head and loss at once.",
    ]
    lines += ["", "| model | T | tokens/s | at once | × | peak GiB | at once |", "|---|---|---|---|---|---|---|"]
    known = {(row["model"], row["size"], _head(row), row["length"], row["compiled"]): row for row in rows if not row.get("logits")}
    kept = [row for row in rows if row.get("logits")]
    for row in sorted(kept, key=lambda row: (row["size"], row["length"], MODELS.index(row["model"]))):
        once = known.get((row["model"], row["size"], _head(row), row["length"], row["compiled"]))
        name = f"{row['model']}, {TITLES[_head(row)]}{row['size'] / 1e6:g}M"
        rates = [f"{r['tokens_per_s']:,.0f}" if r else "–" for r in (row, once)]
        peaks = [f"{r['peak_bytes'] / 2**30:.1f}" if r and r["peak_bytes"] is not None else "–" for r in (row, once)]
        gain = f"{once['tokens_per_s'] / row['tokens_per_s']:.2f}" if once else "–"
        lines.append(f"| {name} | {row['length']:,} | {rates[0]} | {rates[1]} | {gain} | {peaks[0]} | {peaks[1]} |")
    return lines if kept else []


def markdown(result: dict[str, Any], picture: str = "") -> str:
    """picture: the file of `plot`, beside it."""
    lines = ["# Models in training, beside the Transformer", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    rate = result["ceilings"]["matmul_flop_per_s"]
    lines += [
        f"- bf16 matmul at {rate / 1e12:.0f} TFLOP/s; MFU, of it: 6 operations a parameter and token, but embeddings only looked up",
        "",
        f"{TOKENS:,} tokens a step, bfloat16, parameters in float32, AdamW, {VOCABULARY:,} ids; medians of steps; heads of 64.",
    ]
    rows: list[Row] = [row for row in result["training"] if not row.get("logits")]
    for size, head in _kinds(rows):
        for compiled in (True, False):
            some = [row for row in rows if (row["size"], _head(row), row["compiled"]) == (size, head, compiled)]
            if not some:
                continue
            lines += ["", f"## {size / 1e6:g}M parameters, {TITLES[head]}{'compiled' if compiled else 'eager'}", ""]
            each = {row["model"]: row["operations"] / 1e6 for row in sorted(some, key=lambda row: MODELS.index(row["model"]))}
            lines += ["Operations a token, in millions: " + ", ".join(f"{name} {n:.0f}" for name, n in each.items()) + ".", ""]
            lines += ["| T | model | tokens/s | × Transformer | MFU | peak GiB |", "|---|---|---|---|---|---|"]
            for row in sorted(some, key=lambda row: (row["length"], MODELS.index(row["model"]))):
                base = [r["tokens_per_s"] for r in some if r["model"] == BASE and r["length"] == row["length"]]
                ratio = f"{row['tokens_per_s'] / base[0]:.2f}" if base else "–"
                used = row["operations"] * row["tokens_per_s"] / rate
                peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
                lines.append(f"| {row['length']:,} | {row['model']} | {row['tokens_per_s']:,.0f} | {ratio} | {used:.1%} | {peak} |")
    lines += _of_logits(result["training"])
    if result["prompts"]:
        lines += ["", "## Prompts", "", "One sequence, read as `generate` reads it, in pieces.", ""]
        lines += ["| model | parameters | prompt | seconds | peak MiB |", "|---|---|---|---|---|"]
        for row in result["prompts"]:
            peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            size = f"{TITLES[_head(row)]}{row['size'] / 1e6:g}M"
            lines.append(f"| {row['model']} | {size} | {row['prompt']:,} | {row['seconds']:.1f} | {peak} |")
    lines += ["", f"![tokens a second, by length]({picture})"] if picture else []
    return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, rows: list[Row]) -> None:
    """Tokens a second against the length of a sequence, by size and heads."""
    from unisono_tools.experiments import figures

    rows = [row for row in rows if row["compiled"] and not row.get("logits")]
    kinds = _kinds(rows)
    with figures.panels(path, len(kinds), 5 * len(kinds), 4.5) as panels:
        for axes, kind in zip(panels, kinds, strict=True):
            for i, name in enumerate(MODELS):
                some = [r for r in rows if (r["size"], _head(r), r["model"]) == (*kind, name)]
                points = sorted((r["length"], r["tokens_per_s"] / 1e3) for r in some)
                if points:
                    axes.plot(*np.array(points).T, **figures.look(name, i), markersize=4.5, label=name)
            title = f"{kind[0] / 1e6:g}M parameters{'' if len(kinds) == 1 else ', heads ' + kind[1]}"
            axes.set(xscale="log", title=title, xlabel="tokens a sequence", ylabel="thousand tokens a second")
            axes.set_ylim(bottom=0)
            lengths = sorted({row["length"] for row in rows})
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axes.minorticks_off()
        figures.legend_below(panels[0], len(MODELS))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="parameters")
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=["alike"], help="as `unisono match` takes them")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), help="tokens a sequence")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="a step")
    parser.add_argument("--prompts", type=int, nargs="*", default=list(PROMPTS))
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--logits", action="store_true", help="PyTorch's loss of logits, without the operator of head and loss")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, help="models that are compiled at once, where memory holds them")
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json, .md and .png are added")
    parser.add_argument("--one", choices=("trained", "prompted"), help=argparse.SUPPRESS)
    parser.add_argument("--lock", default=LOCK, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    if options.one == "trained":
        sizes = options.lengths, options.tokens
        how = not options.eager, options.steps, options.lock, options.logits, options.heads[0]
        trained(options.models[0], options.sizes[0], *sizes, *how)
        return 0
    if options.one:
        prompted(options.models[0], options.sizes[0], options.prompts, options.lock, options.heads[0])
        return 0
    words = sys.argv[1:] if argv is None else argv
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} thread(s)"
    result: dict[str, Any] = {
        "run": report.about(f"python -m unisono_tools.bench.models {' '.join(words)}".rstrip(), device, "unisono", "torch", "triton"),
        "ceilings": ceilings("cuda" if torch.cuda.is_available() else "cpu"),
        "training": [],
        "prompts": [],
    }
    torch.cuda.empty_cache()
    # each in a process of its own, which leaves no memory behind
    kinds = [
        ("trained", name, size, head)
        for size in options.sizes
        for head in _told_apart(size, options.heads, options.models)
        for name in options.models
    ]
    if options.prompts:
        kinds += [
            ("prompted", name, size, head)
            for size in options.sizes[:1]
            for name in options.models
            if name != BASE
            for head in _told_apart(size, options.heads, [name])
        ]
    kept = threading.Lock()
    picture = f"{options.output.name}.png" if options.output and not options.eager else ""  # what is drawn is compiled

    def run(kind: str, name: str, size: int, head: str) -> None:
        one = ["--one", kind, "--models", name, "--sizes", str(size), "--heads", head]
        command = [sys.executable, "-m", "unisono_tools.bench.models", *words, *one]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                with kept:
                    row = json.loads(line)
                    result["training" if kind == "trained" else "prompts"].append(row)
                    print(*(f"{key}={value}" for key, value in row.items() if key not in ("losses", "operations")), flush=True)
                    report.keep(options.output, result, markdown(result, picture))

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(run, *each) for each in kinds]:
            done.result()
    if options.output and any(row["compiled"] for row in result["training"]):
        plot(options.output.with_suffix(".png"), result["training"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
