"""Exported graphs on one thread of a CPU: `python -m unisono_tools.bench.onnx --output docs/results/onnx-cpu`

Decoding (one sequence, one token a call, the state handed on) and prefill beside PyTorch, eager and compiled, and JAX; targets by length;
precisions by size, speed and error; and latency after ever longer texts. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import Arrays, Config, count_params, init_params, preset, zero_state

from unisono_tools.bench.report import about, ready

# of each size, two architectures: with large matrix states, and with many small ones
SIZES: dict[str, dict[str, Config]] = {
    "lat": {
        "1M": preset("lat-1m"),
        "10M": preset("lat-1m", d_model=384, n_layers=6, head_width=64, qk_width=64),
        "130M": preset("lat-1m", d_model=1024, n_layers=10, head_width=64, qk_width=64),
    },
    "mamba": {
        "1M": preset("mamba-1m"),
        "10M": preset("mamba-1m", d_model=512, n_layers=6),
        "130M": preset("mamba-130m", vocab_size=256, n_layers=34),
    },
}
PREFILL = 512
LENGTHS = (1, 64, 2048)  # of the table of targets
TARGETS, PRECISIONS = ("portable", "ort", "opset27"), ("float32", "float16", "int8", "int4")
READ = (1, 100, 1000, 10_000, 100_000)
Step = Callable[[np.ndarray], np.ndarray]  # tokens [1, T] → logits; keeps the state


@dataclasses.dataclass(frozen=True)
class Row:
    """Milliseconds of one call, and what was asked."""

    table: str
    model: str
    what: str
    length: int
    p50: float
    p99: float
    size: int | None = None  # of the file, bytes
    error: float | None = None  # largest of the logits, of their largest

    @property
    def rate(self) -> float:
        return 1e3 * self.length / self.p50


def times(call: Callable[[], object], seconds: float, least: int = 5) -> tuple[float, float]:
    """Median and 99th percentile, in milliseconds, of as many calls as fit into `seconds`."""
    call()
    found, end = [], time.perf_counter() + seconds
    while len(found) < least or (time.perf_counter() < end and len(found) < 2000):
        begin = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begin))
    return float(np.percentile(found, 50)), float(np.percentile(found, 99))


def graph(path: Path, config: Config) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken, names = {i.name for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    kept = {"state": zero_state(config, 1)}

    def step(tokens: np.ndarray) -> np.ndarray:
        marks = {"reset": np.zeros(tokens.shape, bool), "valid": np.ones(tokens.shape, bool)}
        given = {"tokens": tokens, **marks, **kept["state"]}
        logits, *after = session.run(names, {name: a for name, a in given.items() if name in taken})
        kept["state"] = dict(zip(kept["state"], after, strict=True))
        return logits

    return step


def torches(config: Config, params: Arrays) -> Iterator[tuple[str, Step]]:
    import torch
    import unisono_torch

    torch.set_num_threads(1)
    model: Any = unisono_torch.create(config, params)

    def stepper(forward: Any, one: Any) -> Step:
        kept = {"state": model.init_state(1)}

        def step(tokens: np.ndarray) -> np.ndarray:
            given = torch.from_numpy(tokens)
            with torch.no_grad():
                if tokens.shape[1] == 1:
                    logits, kept["state"] = one(given[:, 0], kept["state"])
                else:
                    logits, kept["state"] = forward(given, kept["state"])
            return logits.numpy()

        return step

    yield "PyTorch, eager", stepper(model, model.step)
    yield "PyTorch, compiled", stepper(torch.compile(model, dynamic=False), torch.compile(model.step, dynamic=False))


def jaxes(config: Config, params: Arrays) -> Iterator[tuple[str, Step]]:
    import unisono_jax

    model: Any = unisono_jax.create(config, params)
    compiled, kept = model.compiled(), {"state": model.init_state(1)}

    def step(tokens: np.ndarray) -> np.ndarray:
        if tokens.shape[1] == 1:
            logits, kept["state"] = compiled.step(tokens[:, 0], kept["state"])
        else:
            logits, kept["state"] = compiled.forward(tokens, kept["state"])
        return np.asarray(logits)

    yield "JAX", step


def engines(name: str, config: Config, params: Arrays, folder: Path, seconds: float) -> Iterator[Row]:
    """Decoding and prefill of every engine."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, PREFILL))
    path = written(config, params, folder, "ort", "float32")
    contestants: list[Iterator[tuple[str, Step]]] = [iter([("onnxruntime, ort", graph(path, config))])]
    contestants += [torches(config, params)] if importlib.util.find_spec("torch") else []
    contestants += [jaxes(config, params)] if importlib.util.find_spec("jax") else []
    for several in contestants:
        for what, step in several:
            for table, given in (("prefill", tokens), ("decode", tokens[:, :1])):
                yield Row(table, name, what, given.shape[1], *times(lambda step=step, given=given: step(given), seconds))


def written(config: Config, params: Arrays, folder: Path, target: str, precision: str) -> Path:
    from unisono_onnx import export

    path = folder / f"{target}.{precision}.onnx"
    export(config, params, path, target=target, precision=precision)
    return path


def targets(name: str, config: Config, params: Arrays, folder: Path, seconds: float) -> Iterator[Row]:
    for target in TARGETS:
        step = graph(written(config, params, folder, target, "float32"), config)
        for length in LENGTHS:
            tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
            yield Row("target", name, target, length, *times(lambda step=step, tokens=tokens: step(tokens), seconds, 3))


def precisions(name: str, config: Config, params: Arrays, folder: Path, seconds: float) -> Iterator[Row]:
    """And onnxruntime's own dynamic int8, whose activations are rounded, too."""
    from onnxruntime.quantization import quantize_dynamic

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 64))
    paths = {precision: written(config, params, folder, "ort", precision) for precision in PRECISIONS}
    paths["dynamic int8 (onnxruntime's)"] = folder / "dynamic.onnx"
    quantize_dynamic(written(config, params, folder, "portable", "float32"), paths["dynamic int8 (onnxruntime's)"])
    true = graph(paths["float32"], config)(tokens)
    for precision, path in paths.items():
        error = float(np.abs(graph(path, config)(tokens) - true).max() / np.abs(true).max())
        step = graph(path, config)
        for given in (tokens[:, :1], tokens):
            found = times(lambda step=step, given=given: step(given), seconds)
            yield Row("precision", name, precision, given.shape[1], *found, path.stat().st_size, error)


def flat(name: str, config: Config, params: Arrays, folder: Path, seconds: float) -> Iterator[Row]:
    """Latency of one token after so many others were read."""
    step, drawn, read = graph(written(config, params, folder, "ort", "float32"), config), np.random.default_rng(0), 0
    for length in READ:
        while read < length:
            piece = min(2048, length - read)
            step(drawn.integers(0, config.vocab_size, (1, piece)))
            read += piece
        token = drawn.integers(0, config.vocab_size, (1, 1))
        yield Row("flat", name, f"after {length:,} tokens", 1, *times(lambda token=token: step(token), seconds))


TABLES = {"engines": engines, "targets": targets, "precisions": precisions, "flat": flat}


def markdown(run: dict[str, str], rows: list[Row]) -> str:
    lines = ["# Exported graphs on a CPU", "", *(f"- {name}: {value}" for name, value in run.items()), ""]
    lines += ["One sequence, one thread, float32. p50 and p99 are milliseconds of one call.", ""]
    titles = {
        "decode": "Decoding: one token a call, the state handed on",
        "prefill": f"Prefill: {PREFILL} tokens in one call",
        "target": "Targets, by the tokens of one call",
        "precision": "Precisions, target ort: error is the largest of a logit, of the largest logit",
        "flat": "Latency of one token after a text, target ort",
    }
    for table, title in titles.items():
        mine = [row for row in rows if row.table == table]
        if not mine:
            continue
        more = table == "precision"
        head = "| model | | T | tokens/s | p50 | p99 |" + (" MB | error |" if more else "")
        lines += [f"## {title}", "", head, "|---" * (8 if more else 6) + "|"]
        for row in mine:
            cells = [row.model, row.what, str(row.length), f"{row.rate:,.0f}", f"{row.p50:.3g}", f"{row.p99:.3g}"]
            cells += [f"{(row.size or 0) / 1e6:.2f}", f"{row.error:.1e}"] if more else []
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.onnx", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=sorted(SIZES), default=sorted(SIZES))
    parser.add_argument("--sizes", nargs="*", choices=("1M", "10M", "130M"), default=["1M", "10M", "130M"])
    parser.add_argument("--tables", nargs="*", choices=sorted(TABLES), default=list(TABLES))
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each is called")
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json and .md are added")
    options = parser.parse_args(argv)
    ready(parser, options.output)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XLA has no option for one thread
    asked = {"models": options.models, "sizes": options.sizes, "tables": options.tables}
    command = "python -m unisono_tools.bench.onnx " + " ".join(f"--{name} {' '.join(values)}" for name, values in asked.items())
    run = about(f"{command} --seconds {options.seconds:g}", "1 thread", "unisono", "onnxruntime", "torch", "jax")
    begun, rows = os.getloadavg()[0], []
    for arch in options.models:
        for size in options.sizes:
            config = SIZES[arch][size]
            params, name = init_params(config), f"{arch}, {count_params(config) / 1e6:.3g}M"
            for table in options.tables:
                if table != "engines" and size == "130M":
                    continue  # what they show is seen at the other sizes
                with tempfile.TemporaryDirectory() as folder:
                    for row in TABLES[table](name, config, params, Path(folder), options.seconds):
                        print(f"{row.model:12} {row.what:30} T={row.length:<5} {row.rate:10,.0f}/s  p50 {row.p50:.3g} ms", flush=True)
                        rows.append(row)
                # of more than one, others had the processor, too: compare rows of one table at best
                run["load"] = f"{begun:.1f} when it began, {os.getloadavg()[0]:.1f} when it ended"
                if options.output:
                    options.output.parent.mkdir(parents=True, exist_ok=True)
                    content = {"run": run, "rows": [dataclasses.asdict(row) for row in rows]}
                    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                    options.output.with_suffix(".md").write_text(markdown(run, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
