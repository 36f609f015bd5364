"""What `nox -s demo` runs: from a text to a trained model, its measure against n-grams, and three engines that agree about it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import unisono_spec
from rich.console import Console
from rich.table import Table
from unisono_conformance import numerics
from unisono_spec.contract import Arrays, Config, InputError, count_params, init_params
from unisono_spec.contract.files import load_params
from unisono_spec.contract.sampling import GREEDY, Sampling

from unisono_tools.backends import open_reader, open_trainer
from unisono_tools.backends.base import Batch, Reader
from unisono_tools.cli import guarded
from unisono_tools.commands.arguments import call, read_config
from unisono_tools.config import TrainConfig, from_dict
from unisono_tools.data import Corpus, load_corpus
from unisono_tools.evaluation import evaluate
from unisono_tools.experiments import figures, ngrams
from unisono_tools.precompute import PrecomputedCorpus, precompute
from unisono_tools.signals import obey
from unisono_tools.streaming import stream
from unisono_tools.train import train
from unisono_tools.train.checkpoint import model_file
from unisono_tools.train.logs import NAME as LOG
from unisono_tools.train.logs import read as read_log
from unisono_tools.voice import Voice

ANOTHER = "another"
PROMPT = "The people of the United States "
HELD_OUT = ("validation", "test")
ENGINES = {"NumPy": "numpy", "PyTorch": "torch", "onnxruntime": "onnx"}
COMPARED = 256  # tokens whose logits the engines are compared on
LONGER = 1.175  # a run that was planned for so many seconds may take so many times as long
FASTER = 1.2  # bfloat16 is used where it is so many times as fast as float32


def run(out: str = "demo", corpus: str = "sotu", seconds: float = 200, steps: int = 0, greedy_tokens: int = 120) -> int:
    """Train cram-demo, compare it with n-grams and xz, generate, export, and check that three engines agree.

    Args:
        out: folder to write; what an earlier demo left there is replaced.
        corpus: name of a corpus, or a path.
        seconds: time to train for; the number of steps is chosen by the speed of this machine, measured first.
        steps: train for exactly so many steps instead.
        greedy_tokens: length of the text that all engines generate.
    """
    if not seconds > 0:
        raise InputError(f"seconds: {seconds}; use a positive number")
    console, folder = Voice(soft_wrap=True, highlight=False), Path(out)
    text = load_corpus(corpus)
    console.print(f"[bold]{text.name}[/]: {len(text.train):,} bytes to learn from; held out: " + _periods(text))
    plan = _plan(folder, corpus, text)
    config = plan.validate()
    shutil.rmtree(folder / "run", ignore_errors=True)
    baselines = {split: _baselines(text, split) for split in HELD_OUT}

    start = time.monotonic()
    xi = precompute(config, text.train, folder / "xi", documents=text.documents["train"])
    console.print(f"ξ of {len(xi.xi):,} positions, for Algorithm 1: {time.monotonic() - start:.1f} s, in {xi.folder}")
    plan = _fitted(plan, config, xi, seconds, steps, console)
    console.print(
        f"training {plan.model.preset}, {count_params(config):,} parameters: {plan.steps:,} steps of {plan.batch_size} positions "
        f"in {plan.dtype}, threads: {plan.threads}"
    )
    start = time.monotonic()
    result = train(plan, text, seconds=math.inf if steps else LONGER * seconds)
    obey(result.signal)
    trained = time.monotonic() - start
    if result.steps < plan.steps:
        console.print(f"stopped at step {result.steps:,}: this machine became slower than it was measured to be")

    checkpoint = folder / "model.safetensors"
    shutil.copyfile(model_file(result.checkpoint), checkpoint)
    readers = _readers(checkpoint, folder / "model.onnx")
    scores = {split: evaluate(readers["PyTorch"], text.split(split)).bits for split in HELD_OUT}
    curve = _curve(folder, baselines["validation"], trained)
    _report(console, baselines, scores, trained)
    console.print("\n[bold]A text it writes[/] (temperature 0.7):")
    console.print(_decoded(text, _written(readers["PyTorch"], text, Sampling(temperature=0.7, seed=1), 400)), markup=False)
    agree = _compare(console, checkpoint, readers, text, greedy_tokens)
    console.print(f"\nwritten: {checkpoint}, {folder / 'model.onnx'}, {curve}, {plan.out}")
    if not agree:
        raise InputError("demo: the engines disagree about this checkpoint; please report it, with the table above")
    return 0


def _plan(folder: Path, corpus: str, text: Corpus) -> TrainConfig:
    if text.tokenizer is None or text.tokenizer.name != "bytes":
        raise InputError(f"corpus: {corpus!r} is not text; give a text file or folder")
    values = read_config("demo")
    values["data"] |= {"corpus": corpus, "precomputed": str(folder / "xi")}
    return from_dict({**values, "out": str(folder / "run")})


def _periods(text: Corpus) -> str:
    return ", ".join(f"{len(text.split(split)):,} ({split})" for split in HELD_OUT)


def _baselines(text: Corpus, split: str) -> dict[str, float]:
    """Bits per byte of what a model must beat, by name."""
    orders = ngrams.witten_bell(np.asarray(text.train), np.asarray(text.split(split)))
    names = {f"Witten–Bell n-gram, order {order}": bits for order, bits in enumerate(orders)}
    return {**names, "xz -9e, the held-out text alone": ngrams.xz(np.asarray(text.split(split)))}


def _fitted(plan: TrainConfig, config: Config, xi: PrecomputedCorpus, seconds: float, steps: int, console: Console) -> TrainConfig:
    """`plan` as this machine runs it fastest, with as many steps as fit: the whole schedule is run, however fast the machine."""
    every = open_trainer(plan, config).threads
    # threads that must share cores with other work wait for one another: one may be the faster number
    tried = [dataclasses.replace(plan, dtype=dtype, threads=n) for n in sorted({1, every}) for dtype in ("float32", "bfloat16")]
    speed = [_seconds_a_step(p, config, xi) for p in tried]
    for p, s in zip(tried, speed, strict=True):
        console.print(f"  {p.dtype:8}  {p.threads} thread{'s' if p.threads > 1 else ' '}  {1000 * s:6.1f} ms a step")
    # 16-bit arithmetic has to earn its rounding
    cost = [s * (FASTER if p.dtype == "bfloat16" else 1) for p, s in zip(tried, speed, strict=True)]
    best = int(np.argmin(cost))
    # evaluations and checkpoints take a little, too
    fitting = max(1, min(plan.steps, int(0.95 * seconds / speed[best])))
    return dataclasses.replace(tried[best], steps=steps or fitting)


def _seconds_a_step(plan: TrainConfig, config: Config, xi: PrecomputedCorpus, least: float = 1.5) -> float:
    """Measured on a trainer that is thrown away, after two steps to warm up."""
    trainer = open_trainer(plan, config)
    trainer.init(init_params(config, plan.seed))
    start, done = 0.0, -2
    while done < 2 or time.perf_counter() - start < least:
        if done == 0:
            start = time.perf_counter()
        trainer.grad_step(Batch(*xi.batch(plan.seed, done + 2, plan.batch_size), precomputed=True), done + 2, 1e-6).read()
        done += 1
    return (time.perf_counter() - start) / done


def _curve(folder: Path, baselines: dict[str, float], trained: float) -> Path:
    rows = read_log(folder / "run" / LOG)
    steps, losses = zip(*((r["step"], r["loss"] / math.log(2)) for r in rows if "loss" in r), strict=True)
    validation = [(r["step"], r["validation_bits"]) for r in rows if "validation_bits" in r]
    shown = {f"order {order}": bits for order, bits in enumerate(list(baselines.values())[2:6], 2)}
    title = f"cram-demo on the CPU, {trained:.0f} s"
    return figures.loss_curve(folder / "loss.png", steps, losses, validation, shown, "bits per byte", title)


def _report(console: Console, baselines: dict[str, dict[str, float]], scores: dict[str, float], trained: float) -> None:
    table = Table(title="Bits per byte of held-out text (less is better)", title_justify="left")
    table.add_column("")
    for split in HELD_OUT:
        table.add_column(split, justify="right")
    for name in baselines[HELD_OUT[0]]:
        table.add_row(name, *(f"{baselines[split][name]:.3f}" for split in HELD_OUT))
    table.add_row(f"[bold]CRAM, after {trained:.0f} s of training", *(f"[bold]{scores[split]:.3f}" for split in HELD_OUT))
    console.print()
    console.print(table)


def _readers(checkpoint: Path, graph: Path) -> dict[str, Reader]:
    """The checkpoint in each engine; exports it on the way."""
    from unisono_tools.backends.onnx import export

    export(checkpoint, graph, "bytes")
    return {engine: open_reader(graph if name == "onnx" else checkpoint, name) for engine, name in ENGINES.items()}


def _written(reader: Reader, text: Corpus, sampling: Sampling, length: int) -> list[int]:
    """The prompt, and what the reader writes after it."""
    assert text.tokenizer is not None
    prompt = text.tokenizer.encode(PROMPT)
    return [*map(int, prompt), *(int(found.tokens[0, 0]) for found in stream(reader, [prompt], length, sampling))]


def _decoded(text: Corpus, ids: list[int]) -> str:
    assert text.tokenizer is not None
    return PROMPT + text.tokenizer.decode(ids[len(text.tokenizer.encode(PROMPT)) :])


def _compare(console: Console, checkpoint: Path, readers: dict[str, Reader], text: Corpus, length: int) -> bool:
    """Print the closing table; whether every engine is within its budget and writes the same text."""
    tokens = np.asarray(text.test[:COMPARED]).astype(np.int64)[None]
    truth, budget = _truth(checkpoint, tokens)
    table = Table(title=f"One checkpoint, {len(readers)} engines (float32)", title_justify="left")
    for column in ("", "largest difference from float64", "share of the budget", "greedy text"):
        table.add_column(column, justify="right" if column else "left")
    texts, shares, verdicts = {}, {}, set()
    for engine, reader in readers.items():
        logits, _ = reader.forward(tokens, reader.init_state(1))
        texts[engine] = _written(reader, text, GREEDY, length)
        shares[engine] = float(numerics.share(logits, truth, budget).max())
        same = _sameness(checkpoint, texts[engine], texts["NumPy"])
        verdicts.add(same)
        table.add_row(engine, f"{np.abs(logits - truth).max():.1e}", f"{shares[engine]:.0%}", f"{same}, {length} bytes")
    console.print()
    console.print(table)
    console.print(
        f"The budget is what rounding alone may cost (docs/conformance.md), here {float(np.median(budget)):.0e} at the median token; "
        f"logits of {tokens.shape[1]} held-out bytes, the largest {np.abs(truth).max():.1f}.\nThe greedy text:"
    )
    console.print(_decoded(text, texts["NumPy"]), markup=False)
    return max(shares.values()) <= 1 and ANOTHER not in verdicts


def _sameness(checkpoint: Path, ids: list[int], others: list[int]) -> str:
    """Two engines' greedy texts may part where rounding decides: where the best two logits are no further apart than both may err."""
    parting = next((i for i, (a, b) in enumerate(zip(ids, others, strict=True)) if a != b), None)
    if parting is None:
        return "the same"
    truth, budget = _truth(checkpoint, np.array([ids[:parting]]))
    second, best = np.sort(truth[0, -1])[-2:]
    return f"the same up to a tie at byte {parting}" if best - second <= 2 * budget[0, -1, 0] else ANOTHER


def _truth(checkpoint: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits by the float64 spec, and the court's budget for float32 implementations."""
    config, params = load_params(checkpoint)

    def logits(dtype: str, seed: int | None = None) -> np.ndarray:
        model = unisono_spec.create(config, _cast(params, dtype), dtype=dtype)
        if seed is not None:
            model.rounded = numerics.perturbation("float32", seed)
        return model.forward(tokens)[0].astype(np.float64)

    truth = logits("float64")
    errors = np.stack([logits("float32", seed) - truth for seed in range(numerics.REALISATIONS)])
    return truth, numerics.row_budget(truth, errors, "float32", tokens.shape[1])


def _cast(params: Arrays, dtype: str) -> Arrays:
    return {name: p.astype(dtype) for name, p in params.items()}


def main(argv: list[str] | None = None) -> int:
    return guarded("demo", lambda: call("demo", run, sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
