"""unisono eval"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from unisono_spec.contract import InputError

from unisono_tools.backends import open_reader
from unisono_tools.commands.arguments import call
from unisono_tools.data import load_corpus
from unisono_tools.evaluation import evaluate
from unisono_tools.train.checkpoint import model_file, training_of
from unisono_tools.train.feed import check_corpus


def run(
    model: str,
    corpus: str | None = None,
    split: Literal["train", "validation", "test"] = "validation",
    backend: Literal["torch", "jax", "numpy", "onnx"] = "torch",
    tokenizer: str | None = None,
    dtype: Literal["float64", "float32", "bfloat16"] = "float32",
    device: str | None = None,
    limit: int = 0,
    window: int = 0,
) -> int:
    """Held-out loss of a trained model: the split is streamed through it in order, in constant memory.

    Args:
        model: folder of a run or of a checkpoint, a .safetensors file, or a .onnx file.
        corpus: name of a corpus, or a path; the one that it was trained on by default.
        split: which part of the corpus.
        backend: what computes.
        tokenizer: bytes or gpt2; the one that it was trained with by default.
        dtype: compute dtype.
        device: cpu or cuda; the backend's own choice by default.
        limit: read only so many tokens; 0 reads all.
        window: start anew after so many tokens; 0 reads one unbroken stream.
    """
    path = model_file(Path(model))
    reader = open_reader(path, backend, dtype, device)
    training = training_of(path)
    name = corpus or (training.data.corpus if training else None)
    if name is None:
        raise InputError(f"corpus: nothing beside {path} says what it was trained on; give --corpus")
    coder = tokenizer or reader.tokenizer or (training.data.tokenizer if training else "bytes")
    text = load_corpus(name, coder, training.data.limit if training and corpus is None else None)
    check_corpus(reader.config, text)
    score = evaluate(reader, text.split(split), limit, window)
    print(f"{path} on {name}, {split}: {score.targets:,} {'pixels' if text.tokenizer is None else 'tokens'}, backend {backend}")
    if text.tokenizer is None:
        print(f"bits per pixel   {score.bits:.6f}")
        return 0
    print(f"bits per byte    {score.bits / text.bytes_per_token(split):.6f}")
    print(f"bits per token   {score.bits:.6f}")
    print(f"perplexity       {score.perplexity:.4f} a token")
    return 0


def main(argv: list[str]) -> int:
    return call("eval", run, argv)
