"""unisono precompute"""

from __future__ import annotations

from typing import Any

from rich.progress import Progress
from unisono_spec.contract import preset as find_preset
from unisono_spec.contract.plain import expanded

from unisono_tools.commands.arguments import call
from unisono_tools.data import load_corpus
from unisono_tools.precompute import precompute
from unisono_tools.train.loader import check_corpus
from unisono_tools.voice import Voice


def run(
    out: str,
    preset: str = "cram-demo",
    overrides: dict[str, Any] | None = None,
    corpus: str = "sotu",
    tokenizer: str = "bytes",
) -> int:
    """Stream ξ of a corpus's training split to files, for `unisono train --mode positions` (Algorithm 1).

    Args:
        out: folder to write.
        preset: the model whose ξ it is; of the fixed scheme, with binary or frame codes.
        overrides: config fields that differ from the preset, as in --overrides.decay 0.7.
        corpus: name of a corpus, or a path.
        tokenizer: bytes or gpt2.
    """
    config = find_preset(preset, **(overrides or {}))
    text = load_corpus(corpus, tokenizer)
    check_corpus(config, text)
    console = Voice(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("ξ", total=len(text.train))
        made = precompute(
            config, text.train, expanded(out), documents=text.documents["train"], progress=lambda done, _: bar.update(task, completed=done)
        )
    print(f"{made.folder}: ξ of {len(made.xi):,} positions, {made.xi.shape[1]} numbers each")
    return 0


def main(argv: list[str]) -> int:
    return call("precompute", run, argv)
