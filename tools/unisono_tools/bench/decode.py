"""What a decoded token costs on a GPU: a step at a time, and by the graph that `generate` replays.

python -m unisono_tools.bench.decode --output docs/results/decode-h100      # writes .json and .md

Contexts are set, not read: states are zeros, at the position that so many tokens would have left. A token is greedy, and at the first
context drawn, too (top_k, top_p), and one a call. Beside each model a Transformer with as many parameters (`unisono match`), by the same
kind of graph.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import unisono_torch
from unisono_spec.contract import Config, count_params, preset
from unisono_spec.contract.base import ANY
from unisono_spec.contract.sampling import Sampling
from unisono_torch.decoding import Decoder

from unisono_tools.bench import report
from unisono_tools.bench.measure import ceilings
from unisono_tools.bench.models import operations
from unisono_tools.experiments.match import nearest

MODELS = ("lat-base", "transformer-base", "mamba-130m", "s4d-base", "cram-paper", "infinityformer-base", "maru", "based")
CONTEXTS = (1 << 10, 1 << 15, 1 << 17, 1 << 20)
SOME = 8, 16  # sequences, at the first context
LARGE, LARGE_CONTEXTS = 256, (1 << 10, 1 << 15)
ROOM = 1024  # tokens that a cache holds beyond its context
MEMORY = 60e9  # bytes of state, at most
BASE = "transformer-base"
DRAWN = Sampling(0.8, top_k=50, top_p=0.95, seed=1)
WARM_UP = 10  # ids one a call, after which a decoder is kept
Row = dict[str, Any]


def state_at(model: Any, batch: int, context: int) -> dict[str, torch.Tensor]:
    state = model.init_state(batch, context + ROOM)
    if "position" in state:
        state["position"].fill_(context)
    return state


def steps_us(model: Any, state: dict[str, torch.Tensor], steps: int) -> float:
    """The median of steps one by one, each id chosen on the host."""
    token, times = torch.zeros(next(iter(state.values())).shape[0], dtype=torch.int64, device="cuda"), []
    with torch.no_grad():
        for _ in range(steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            logits, state = model.step(token, state)
            token = torch.as_tensor(logits.float().cpu().numpy().argmax(-1), device="cuda")
            times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def graph_us(decoder: Decoder, steps: int) -> float:
    """The median of rounds of steps in a row."""
    times = []
    for _ in range(5):
        decoder.number.zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            decoder.advance()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - begin) / steps)
    return statistics.median(times)


def one_us(model: Any, state: dict[str, torch.Tensor], calls: int) -> float:
    """The median of calls of `generate` for one id each, which take the state and hand it out."""
    token, number, times = np.zeros((1, 1), np.int64), 0, []
    for _ in range(calls + WARM_UP):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        found = model.generate(token, 1, DRAWN, state, number)
        times.append(1e6 * (time.perf_counter() - begin))
        token, state, number = found.tokens, found.state, found.n_generated
    return statistics.median(times[WARM_UP:])


def kernels(decoder: Decoder, steps: int = 10) -> float:
    """Of a token."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            decoder.advance()
        torch.cuda.synchronize()
    return sum(each.count for each in seen.key_averages() if each.device_time_total) / steps


def twin(config: Config) -> tuple[str, Config]:
    """The Transformer of its size, by name."""
    count, base = count_params(config), preset(BASE)
    if count == count_params(base):
        return BASE, base
    return f"transformer of {count / 1e6:.0f}M", nearest("transformer", count, config.vocab_size)


@torch.no_grad()
def drawn(config: Config) -> Any:
    """A model with numbers drawn on the GPU, which takes no time; what a token costs does not depend on them."""
    zeros = {name: np.zeros(p.shape, np.float32) for name, p in config.params().items()}
    model: Any = unisono_torch.create(config, zeros, dtype="bfloat16", param_dtype="bfloat16", device="cuda")
    for p in model.parameters():
        p.normal_(std=0.02)
    return model


def measure(name: str, model: Any, batch: int, context: int, before: bool, kept: dict[int, Decoder]) -> Row:
    """A row; kept: the decoder of the last batch, which serves at another context, too, where only a position tells contexts apart."""
    config = model.config
    row: Row = {"model": name, "parameters": count_params(config), "layers": config.n_layers, "batch": batch, "context": context}
    with torch.no_grad():
        numbers = sum(math.prod(s.shape) for s in config.states(context + ROOM).values())
        if 4 * batch * numbers > MEMORY:
            return {**row, "note": f"a state of {4e-9 * batch * numbers:.0f} GB"}
        caches = any(ANY in s.shape for s in config.states().values())
        decoder = None if caches else kept.get(batch)
        kept.clear()
        state = state_at(model, batch, context)
        row["state_bytes"] = sum(a.nbytes for a in state.values())
        if before:
            row["step_us"], row["one_us"] = steps_us(model, state, 12), one_us(model, state, 12)
            of_draws = Decoder(model, state, "drawn")
            settings = (of_draws.temperature, DRAWN.temperature), (of_draws.top_k, DRAWN.top_k), (of_draws.top_p, DRAWN.top_p)
            for setting, value in settings:
                setting.fill_(value)
            row["drawn_us"] = graph_us(of_draws, 50)
        if decoder is None:
            decoder = Decoder(model, state, "greedy")
        for key, own in decoder.state.items():
            own.copy_(state[key])
        state.clear()
        row["floor_bytes"] = floor_bytes(config, decoder.state, context)
        row["graph_us"], row["kernels"] = graph_us(decoder, 50), kernels(decoder)
        if not caches:
            kept[batch] = decoder
    return row


def floor_bytes(config: Config, state: dict[str, torch.Tensor], context: int) -> float:
    """Each weight of a product in bfloat16 read once, each state read and written, what a cache holds read."""
    caches = {name for name, s in config.states().items() if ANY in s.shape}
    held = context / (context + ROOM)
    return operations(config) / 3 + sum(a.nbytes * (held if name in caches else 2) for name, a in state.items())


def markdown(result: dict[str, Any]) -> str:
    rate = result["ceilings"]["copy_bytes_per_s"]
    lines = ["# Decoding on a GPU", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    lines += [
        "- bfloat16, parameters too; microseconds a token of the whole batch, the choice of its id included; step: `Model.step` and a",
        f"  choice on the host; graph: what `generate` replays, greedy; drawn: that, with top_k {DRAWN.top_k} and top_p {DRAWN.top_p};",
        "  one a call: `generate` of one id, drawn, whose state is handed out and in. Contexts are set, not read. Ratios: to a Transformer",
        "  of as many parameters. kernels: of a token, by the profiler.",
        f"- floor: weights and caches read once, states read and written, at a copy's {rate / 1e12:.2f} TB/s",
        "",
        "| model | parameters | batch | context | step µs | one a call µs | drawn µs | graph µs | kernels / layers | of floor | "
        "× its Transformer |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = {(row["model"], row["batch"], row["context"]): row.get("graph_us") for row in result["rows"]}
    for row in result["rows"]:
        start = f"| {row['model']} | {row['parameters'] / 1e6:.1f}M | {row['batch']} | {row['context']:,} |"
        if "graph_us" not in row:
            lines.append(f"{start} – | – | – | {row['note']} | | | |")
            continue
        dear = " | ".join(f"{row[each]:,.0f}" if each in row else "–" for each in ("step_us", "one_us", "drawn_us"))
        base = found.get((row.get("twin"), row["batch"], row["context"]))
        ratio = f"{base / row['graph_us']:.2f}" if base else "–"
        share = row["floor_bytes"] / rate / (1e-6 * row["graph_us"])
        launched = f"{row['kernels']:.0f} / {row['layers']}"
        lines.append(f"{start} {dear} | {row['graph_us']:,.0f} | {launched} | {share:.0%} | {ratio} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="unisono_tools.bench.decode", description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="batch 1 at the first and the last context")
    parser.add_argument("--batches", type=int, nargs="*", help="these at the first context, and nothing else")
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    words = sys.argv[1:] if argv is None else argv
    command = f"python -m unisono_tools.bench.decode {' '.join(words)}".rstrip()
    result: dict[str, Any] = {"run": report.about(command, torch.cuda.get_device_name(), "unisono", "torch", "triton")}
    result |= {"ceilings": ceilings("cuda"), "rows": []}
    points = [(1, context) for context in (CONTEXTS[:: len(CONTEXTS) - 1] if options.quick else CONTEXTS)]
    points += [] if options.quick else [(batch, CONTEXTS[0]) for batch in SOME] + [(LARGE, context) for context in LARGE_CONTEXTS]
    points = [(batch, CONTEXTS[0]) for batch in options.batches] if options.batches else points
    configs: dict[str, Config] = {}
    twins: dict[str, str] = {}
    for name in options.models:  # each beside its own Transformer, so that a run cut short says something
        configs[name] = preset(name)
        twins[name], beside = twin(configs[name])
        configs.setdefault(twins[name], beside)
    for name, config in configs.items():
        model, kept = drawn(config), {}
        for batch, context in points:
            before = not options.quick and name in options.models and (batch, context) == (1, CONTEXTS[0])
            row = measure(name, model, batch, context, before, kept)
            result["rows"].append({**row, **({"twin": twins[name]} if name in twins else {})})
            torch.cuda.empty_cache()
            print(result["rows"][-1], flush=True)
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                options.output.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
