"""unisono import"""

from __future__ import annotations

import sys

from unisono_spec.contract import InputError, count_params
from unisono_spec.contract.files import save_params, write_bytes
from unisono_spec.contract.plain import expanded, read_file
from unisono_spec.contract.published import read

from unisono_tools.commands.arguments import call
from unisono_tools.data.tokenizers import DEFINITION, MAX_DEFINITION, restore
from unisono_tools.train.checkpoint import MODEL


def run(source: str, out: str = "imported", revision: str | None = None) -> int:
    """Write a checkpoint that others published as one of ours, which every room and every verb reads.

    Args:
        source: folder with config.json and safetensors, or owner/name on the hub (hf:owner/name where a folder has that name).
        out: folder that gets model.safetensors, and tokenizer.json where the source has one.
        revision: branch, tag or commit of the hub's repository.
    """
    folder = expanded(out)
    if (folder / MODEL).exists():
        raise InputError(f"out: {folder} holds a model already; give another folder, or remove it")
    published = read(source, revision)
    definition = published.place.get(DEFINITION)
    text = None if definition is None else read_file(definition, "restore or remove it", MAX_DEFINITION)
    tokenizer = None if text is None else restore(DEFINITION, text.decode(errors="replace"))
    if tokenizer is not None and tokenizer.vocab_size > published.config.vocab_size:
        raise InputError(
            f"{definition}: has {tokenizer.vocab_size} ids, the model {published.config.vocab_size}; remove it, or give the model's own"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if text is not None:
        write_bytes(folder / DEFINITION, text)
    save_params(folder / MODEL, published.config, published.params)
    number = count_params(published.config)
    print(f"{folder / MODEL}: {published.config.arch}, {number:,} parameters, from {published.place} (named as in {published.naming})")
    if text is None:
        print(f"{published.place} has no {DEFINITION}: give its tokenizer to generate and eval by --tokenizer", file=sys.stderr)
    return 0


def main(argv: list[str]) -> int:
    return call("import", run, argv)
