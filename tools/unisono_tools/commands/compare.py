"""unisono compare"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.commands.arguments import call
from unisono_tools.commands.match import number
from unisono_tools.data import load_corpus
from unisono_tools.experiments import compare
from unisono_tools.experiments.worker import origin
from unisono_tools.voice import Voice


def run(
    params: str = "1M",
    corpus: str = "sotu",
    steps: int = 600,
    batch_size: int = 16,
    seq_len: int = 256,
    lr: float = 2e-3,
    backend: Literal["torch", "jax"] | None = None,
    models: list[str] | None = None,
    seeds: int = 3,
    jobs: int = 1,
    out: str = "compare",
) -> int:
    """Train one model of each architecture, equal in size, on the same tokens, and draw what came out.

    Args:
        params: size of each model
        corpus: name of a corpus, or the path of a text
        steps: of each run
        batch_size: sequences a step
        seq_len: tokens a sequence
        lr: peak learning rate, the same for all
        backend: torch or jax; by default what is installed
        models: some of the names that `unisono match` prints; all by default
        seeds: runs of each model, which differ in initial weights and order of the data
        jobs: runs at once, each in a process of its own
        out: folder of the runs and of the figures; runs that are there already are continued
    """
    console, folder, text = Voice(soft_wrap=True, highlight=False), expanded(out), load_corpus(corpus)
    chosen = compare.choose(models, number(params))
    if seeds < 1:
        raise InputError(f"seeds: {seeds}; use a positive number of runs")
    if jobs < 1:
        raise InputError(f"jobs: {jobs}; use a positive number of processes")
    shared = (steps, batch_size, seq_len, lr, backend)
    runs = {
        name: [compare.plan(name, config, folder, corpus, *shared, seed=seed) for seed in range(seeds)] for name, config in chosen.items()
    }
    curves = compare.learn(runs, text, jobs, console)
    tokens, repeated = steps * batch_size * seq_len / 1e6, "one seed" if seeds == 1 else f"{seeds} seeds"
    budget = f"{params} parameters, {tokens:.1f}M tokens of {Path(text.name).name}, {repeated}"
    first = {name: each[0] for name, each in runs.items()}
    said = ["--params", params, "--corpus", corpus, "--steps", steps, "--batch_size", batch_size, "--seq_len", seq_len, "--lr", lr]
    said += ["--seeds", seeds, *(["--models", f"[{', '.join(models)}]"] if models else [])]
    made = {"command": shlex.join(["unisono", "compare", *map(str, said)]), **origin(backend, None), "seeds": list(range(seeds))}
    drawn = compare.report(curves, text, folder, budget, made, console), compare.dependencies(first, folder)
    console.print(f"drawn: {', '.join(map(str, drawn))}")
    return 0


def main(argv: list[str]) -> int:
    return call("compare", run, argv)
