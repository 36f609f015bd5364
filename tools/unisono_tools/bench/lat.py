"""LAT at its readme's configuration: `python -m unisono_tools.bench.lat --device cpu --output docs/results/lat-cpu`, or on a GPU.

Six layers of 512, heads of 64, GPT-2's vocabulary (the preset lat-base). Tokens a second of reading, of a training step and of generating;
the memory that one sequence more takes in training and, on a GPU, in generating, which the readme gives as 2.1 GB with no length. On a
CPU it is the growth of a process of its own, and the state is counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import unisono_torch
from torch.nn import functional as F
from unisono_spec.contract import DTYPES, InputError, preset, state_dtype

from unisono_tools.bench.linear import peak_mebibytes, reason
from unisono_tools.bench.measure import peak_bytes
from unisono_tools.bench.report import about, ready

CONFIG = preset("lat-base")
LENGTHS = (1024, 2048)
Row = dict[str, Any]


def measure(device: str, dtype: str, repeats: int) -> list[Row]:
    """Rows with tokens_a_second (the median) or bytes a sequence."""
    model: Any = unisono_torch.create(CONFIG, dtype=dtype, device=device)
    tokens = _tokens(8, max(LENGTHS)).to(device)

    def train(batch: int, length: int) -> None:
        _train(model, tokens[:batch, : length + 1])

    def read() -> None:
        with torch.no_grad():
            model(tokens[:1, : LENGTHS[0]])

    def write(batch: int = 1) -> None:
        state = model.init_state(batch)
        with torch.no_grad():
            for t in range(32):
                _, state = model.step(tokens[:batch, t], state)

    rows: list[Row] = []
    for what, call, number in (
        (f"reading {LENGTHS[0]:,}", read, LENGTHS[0]),
        (f"training step of {LENGTHS[0]:,}", lambda: train(1, LENGTHS[0]), LENGTHS[0]),
        ("generating", write, 32),
    ):
        speed = number / _seconds(call, device, repeats)
        rows.append({"what": what, "dtype": dtype, "threads": torch.get_num_threads() if device == "cpu" else 0, "tokens_a_second": speed})
    calls = [(f"a sequence of {length:,} in training", lambda n, t=length: train(n, t)) for length in LENGTHS]
    for what, call in [*calls, ("a sequence in generating", write)] if device != "cpu" else []:
        two, eight = (peak_bytes(lambda n=n, call=call: call(n), device) or 0 for n in (2, 8))
        rows.append({"what": what, "dtype": dtype, "bytes": (eight - two) / 6})
    return rows


def memory(dtype: str) -> list[Row]:
    """Of a CPU: bytes that a sequence more takes in training, and those of its state."""
    one, three = (_grown(batch, LENGTHS[0], dtype) for batch in (1, 3))
    size = sum(math.prod(state.shape) for state in CONFIG.states().values()) * DTYPES[state_dtype(dtype)].itemsize
    return [
        {"what": f"a sequence of {LENGTHS[0]:,} in training", "dtype": dtype, "bytes": (three - one) / 2},
        {"what": "the state of a sequence, counted", "dtype": state_dtype(dtype), "bytes": size},
    ]


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))


def _train(model: Any, tokens: torch.Tensor) -> None:
    """The loss of tokens [B, T + 1], and its gradient."""
    logits, _ = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    model.zero_grad()


def _grown(batch: int, length: int, dtype: str) -> int:
    """Bytes that a process of its own takes at most for a training step."""
    command = [sys.executable, "-m", "unisono_tools.bench.lat", "--dtypes", dtype, "--peak", str(batch), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{batch} sequences of {length} tokens: {reason(done)}; free some memory")
    return int(done.stdout)


def _seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def markdown(content: dict[str, Any]) -> str:
    lines = ["# LAT at its readme's configuration", "", *(f"- {name}: {value}" for name, value in content["run"].items()), ""]
    lines += ["lat-base: 6 layers of 512, heads of 64, vocabulary 50,257; one sequence at a time.", ""]
    lines += ["| what | dtype | threads | tokens/s | MB |", "|---" * 5 + "|"]
    for row in content["rows"]:
        speed = f"{row['tokens_a_second']:,.0f}" if "tokens_a_second" in row else ""
        size = f"{row['bytes'] / 1e6:,.1f}" if "bytes" in row else ""
        lines.append(f"| {row['what']} | {row['dtype']} | {row.get('threads') or ''} | {speed} | {size} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.lat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, nargs="*", default=[1], help="of a CPU, one after another")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json and .md are added")
    parser.add_argument("--peak", type=int, nargs=2, metavar=("BATCH", "LENGTH"), help="bytes that this process takes for a training step")
    options = parser.parse_args(argv)
    ready(parser, options.output)
    if options.peak:
        batch, length = options.peak
        _train(unisono_torch.create(CONFIG, dtype=options.dtypes[0]), _tokens(batch, length))
        print(int(peak_mebibytes() * (1 << 20)))
        return 0
    rows, load = [], f"{os.getloadavg()[0]:.1f} when it began"
    for threads in options.threads if options.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        rows += [row for dtype in options.dtypes for row in measure(options.device, dtype, options.repeats)]
    rows += [row for dtype in options.dtypes for row in memory(dtype)] if options.device == "cpu" else []
    chosen = f"--threads {' '.join(map(str, options.threads))} " * (options.device == "cpu")
    command = f"python -m unisono_tools.bench.lat --device {options.device} {chosen}--dtypes {' '.join(options.dtypes)}"
    command += f" --repeats {options.repeats}"
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    run = about(command, where, "torch") | {"load": f"{load}, {os.getloadavg()[0]:.1f} when it ended"}
    content = {"run": run, "rows": rows}
    print(markdown(content))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
