"""What the training loop costs: tokens a second of whole runs, beside those of a bare step.

    python -m unisono_tools.bench.loop --output docs/results/loop

A bare step is what one would write without these tools: forward, loss, backward, clipping and the framework's AdamW on one batch that lies
on the device, with nothing read, drawn, logged or saved; in float16 with the framework's loss scaling. The loop draws its batches from a
corpus, watches for NaN and signals, and writes its log; what it takes is read off the log, between the first steps and the last, so that
start and final checkpoint are left out. Each is measured in a process of its own, which has the devices to itself, or with `--together` in
one, where the loop stops before it would evaluate and save. With `--rounds` each is measured so often, in turn, and the table has the
medians. With `devices=2` the bare step is one device's with the same batch, or with `batch_size=…` with that of `--batch_size`: 200 %
would be perfect scaling.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import multiprocessing
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from rich.console import Console
from unisono_spec.contract import init_params

from unisono_tools.backends import open_trainer
from unisono_tools.bench.report import about, ready
from unisono_tools.config import ModelChoice, TrainConfig, to_dict
from unisono_tools.reading import dump_yaml
from unisono_tools.signals import Signals
from unisono_tools.train.logs import NAME, read
from unisono_tools.train.loop import Run, initial, open_datamodule

WARM_UP = 20  # steps that compile, allocate and fill the queue


def plan(options: argparse.Namespace, **changes: Any) -> TrainConfig:
    fields = {
        "model": ModelChoice(options.model),
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "steps": WARM_UP + options.steps,
        "eval_every": 10**6,
        "checkpoint_every": 10**6,
        "log_every": 10,
        "dtype": options.dtype,
        "backend": options.backend,
        "device": options.device,
        "cuda_graphs": False,  # nor has the bare step any; --with cuda_graphs=true tells what they give
    }
    return TrainConfig(**{**fields, **changes})


def loop_rate(config: TrainConfig, together: bool = False) -> dict[str, Any]:
    """Tokens a second of a whole run, in a process of its own as users start it; its last loss; the most memory that it says it held."""
    if together:
        rate, loss = pace(config)
        return {"loop": rate, "loss": loss, "memory": ""}
    with tempfile.TemporaryDirectory() as folder:
        run, path = pathlib.Path(folder) / "run", pathlib.Path(folder) / "config.yaml"
        path.write_text(dump_yaml({**to_dict(config), "out": str(run)}), encoding="utf-8")
        command = [sys.executable, "-m", "unisono_tools.cli", "train", "--config", str(path)]
        # what it says meanwhile is shown as it comes, so that a run that hangs says where
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rate, loss = rate_of(run, config)
    return {"loop": rate, "loss": loss, "memory": said.rpartition("memory: at most ")[2].strip()}


def pace(config: TrainConfig) -> tuple[float, float]:
    """As rate_of, of a run in this process that is left before its last step, so that it neither evaluates nor saves."""
    gc.collect()  # of a run before it, whose room is needed
    config = dataclasses.replace(config, steps=config.steps + 1)
    model = config.validate()
    data, trainer = open_datamodule(config, model), open_trainer(config, model)
    trainer.init(initial(config, model))
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, out=folder)
        run = Run(config, model, data, trainer, None, None, Console(quiet=True), math.inf, Signals())
        while run.done < config.steps - 1:
            run.step(data.batch(run.done))
        run.read(0)
        if run.log is None:  # the first process writes it
            return 0.0, 0.0
        run.log.close()
        return rate_of(pathlib.Path(folder), dataclasses.replace(config, steps=run.done))


def rate_of(run: pathlib.Path, config: TrainConfig) -> tuple[float, float]:
    """Tokens a second after the first WARM_UP steps of a run that has taken all its steps; its last loss."""
    rows = {row["step"]: row for row in read(run / NAME) if "loss" in row}
    tokens = config.batch_size * config.seq_len * (config.steps - WARM_UP)
    return tokens / (rows[config.steps]["time"] - rows[WARM_UP]["time"]), rows[config.steps]["loss"]


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own, whose end gives back what it held of a GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def bare_rate(train: TrainConfig) -> float:
    """Tokens a second of a bare step."""
    config = train.validate()
    params = init_params(config, 0, train.param_dtype)
    rows = np.random.default_rng(0).integers(0, 256, (train.batch_size, train.seq_len + 1))
    begin = {"torch": _bare_torch, "jax": _bare_jax}[train.backend or "torch"]
    step, wait = begin(train, params, rows)
    for _ in range(WARM_UP):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(train.steps - WARM_UP):
        step()
    wait()
    return train.batch_size * train.seq_len * (train.steps - WARM_UP) / (time.perf_counter() - start)


def _bare_torch(train: TrainConfig, params: Any, rows: np.ndarray) -> Any:
    import torch
    import unisono_torch

    device = train.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = unisono_torch.create(train.model.config(), params, dtype=train.dtype, device=device)
    nats = torch.compile(model.nats, dynamic=False) if train.compile else model.nats
    opt = train.optimizer
    adamw = torch.optim.AdamW(model.parameters(), opt.lr, (opt.beta1, opt.beta2), opt.eps, opt.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=train.dtype == "float16")
    inputs, targets = (torch.tensor(a, device=device) for a in (rows[:, :-1], rows[:, 1:]))

    def step() -> None:
        scaler.scale(nats(inputs, targets)[0] / targets.numel()).backward()
        scaler.unscale_(adamw)
        torch.nn.utils.clip_grad_norm_(model.parameters(), opt.clip)
        scaler.step(adamw)
        scaler.update()
        adamw.zero_grad(set_to_none=True)

    return step, torch.cuda.synchronize if device == "cuda" else lambda: None


def _bare_jax(train: TrainConfig, params: Any, rows: np.ndarray) -> Any:
    import jax
    import optax
    import unisono_jax

    from unisono_tools.backends.jax import functional

    model, named = functional(unisono_jax.create(train.model.config(), params, dtype=train.dtype, device=train.device))
    opt = train.optimizer
    adamw = optax.chain(
        optax.clip_by_global_norm(opt.clip), optax.adamw(opt.lr, opt.beta1, opt.beta2, opt.eps, weight_decay=opt.weight_decay)
    )
    inputs, targets = (jax.device_put(a.astype(np.int32)) for a in (rows[:, :-1], rows[:, 1:]))

    def loss(named: Any) -> jax.Array:
        logits = model(named).forward(inputs)[0].astype("float32")
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def update(named: Any, state: Any) -> Any:
        updates, state = adamw.update(jax.grad(loss)(named), state, named)
        return optax.apply_updates(named, updates), state

    held = [named, adamw.init(named)]

    def step() -> None:
        held[:] = update(*held)

    return step, lambda: jax.block_until_ready(held)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.loop", description="Time training loops beside bare steps.")
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch")
    parser.add_argument("--device", default=None)
    parser.add_argument("--model", default="cram-1m")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--with", dest="layouts", nargs="*", default=[], help="runs with options, as in ema=0.999 devices=2,parallel=fsdp")
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added, rows appended")
    parser.add_argument("--together", action="store_true", help="all in this process, which starts once")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured, in turn")
    options = parser.parse_args(argv)
    ready(parser, options.output)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: use 1 or more")
    if options.steps % 10:
        parser.error(f"--steps {options.steps}: use a multiple of 10, since every tenth step is logged")

    words = sys.argv[1:] if argv is None else argv
    alone = (lambda function, *args: function(*args)) if options.together else apart
    device = alone(_device, options.backend, options.device)
    run = about(f"python -m unisono_tools.bench.loop {' '.join(without_output(words))}", device, "unisono", "torch", "jax")
    before = (
        json.loads(options.output.with_suffix(".json").read_text())
        if options.output and options.output.with_suffix(".json").is_file()
        else []
    )
    rows: list[dict[str, Any]] = []
    bares: dict[str, list[float]] = {}
    loops: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        plain = alone(bare_rate, plan(options))
        print(f"bare step: {plain:,.0f} tokens/s", file=sys.stderr, flush=True)
        for text in ["", *options.layouts]:
            config = plan(options, **changes(text))
            bares.setdefault(text, []).append(alone(bare_rate, config) if changes(text).keys() & {"compile", "dtype"} else plain)
            loops.setdefault(text, []).append(loop_rate(config, options.together))
            print(f"{text or 'loop'}: {loops[text][-1]['loop']:,.0f} tokens/s", file=sys.stderr, flush=True)
        rows = [_row(options, text, bares[text], loops[text]) for text in loops]
        if options.output:
            _write([*before, {"run": run, "rows": rows}], options.output)
    print(*map(_line, rows), sep="\n", flush=True)
    return 0


def _row(options: argparse.Namespace, text: str, bare: list[float], loop: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table says of one layout: medians over the rounds."""
    config = plan(options, **changes(text))
    about_it = {"backend": options.backend, "model": options.model, "batch": f"{config.batch_size} × {config.seq_len}"}
    rates = {"bare": statistics.median(bare), "loop": statistics.median(one["loop"] for one in loop)}
    return {**about_it, "dtype": config.dtype, "with": text, **loop[-1], **rates, "rounds": len(loop)}


def changes(text: str) -> dict[str, Any]:
    """What `ema=0.999,compile=true` changes in a TrainConfig."""
    return dict(_option(pair) for pair in text.split(",") if pair)


def without_output(words: Sequence[str]) -> list[str]:
    """A command line as results files show it: they lie where they lie."""
    return [w for i, w in enumerate(words) if w != "--output" and (i == 0 or words[i - 1] != "--output")]


def _option(pair: str) -> tuple[str, Any]:
    """A field of TrainConfig and its value: a number, true, false or a text."""
    name, _, value = pair.partition("=")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


def _device(backend: str, device: str | None) -> str:
    if backend == "jax":
        from unisono_tools.backends.jax import device_name

        return device_name(device)
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return f"{torch.get_num_threads()} thread(s)"
    return torch.cuda.get_device_name()


def _line(row: dict[str, Any]) -> str:
    cells = (row[name] for name in ("backend", "model", "batch", "dtype", "with"))
    return f"| {' | '.join(cells)} | {row['bare']:,.0f} | {row['loop']:,.0f} | {row['loop'] / row['bare']:.1%} | {row.get('memory', '')} |"


def _write(runs: list[dict[str, Any]], stem: pathlib.Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [
        "# What the training loop costs",
        "",
        "Tokens a second of whole runs beside those of a bare step (`bench/loop.py` says what both do).",
        "",
    ]
    for one in runs:
        lines += [*(f"- {name}: {value}" for name, value in one["run"].items()), ""]
        lines += [
            "| backend | model | batch | dtype | with | bare step | loop | loop ÷ bare | memory |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [*map(_line, one["rows"]), ""]
    stem.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
