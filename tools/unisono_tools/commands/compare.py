"""unisono compare"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from unisono_tools import compare
from unisono_tools.commands.arguments import call
from unisono_tools.commands.match import number
from unisono_tools.data import load_corpus


def run(
    params: str = "1M",
    corpus: str = "sotu",
    steps: int = 600,
    batch_size: int = 16,
    seq_len: int = 256,
    lr: float = 2e-3,
    backend: str = "torch",
    models: list[str] | None = None,
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
        backend: torch or jax
        models: some of the names that `unisono match` prints; all by default
        out: folder of the runs and of the figures; runs that are there already are continued
    """
    console, folder, text = Console(soft_wrap=True, highlight=False), Path(out), load_corpus(corpus)
    chosen = compare.choose(models, number(params))
    shared = (steps, batch_size, seq_len, lr, backend)
    runs = {name: compare.plan(name, config, folder, corpus, *shared) for name, config in chosen.items()}
    curves = []
    for name, run in runs.items():
        console.print(f"[bold]{name}[/]")
        curves.append(compare.learn(name, run, text))
    budget = f"{params} parameters, {steps * batch_size * seq_len / 1e6:.1f}M tokens of {Path(text.name).name}"
    drawn = compare.report(curves, text, folder, budget, console), compare.dependencies(runs, folder)
    console.print(f"drawn: {', '.join(map(str, drawn))}")
    return 0


def main(argv: list[str]) -> int:
    return call("compare", run, argv)
