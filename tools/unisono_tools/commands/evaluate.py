"""unisono eval"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.backends import open_reader
from unisono_tools.backends.base import Reader
from unisono_tools.commands.arguments import call
from unisono_tools.config import DataChoice
from unisono_tools.data import load_tokenizer
from unisono_tools.evaluation import default_window, evaluate
from unisono_tools.tasks import Task, open_task
from unisono_tools.train.checkpoint import model_file, saved_tokenizer, training_of
from unisono_tools.train.datamodule import load
from unisono_tools.train.loader import check_corpus
from unisono_tools.train.progress import Evaluating
from unisono_tools.train.task_datamodule import check_task, evaluate_task

EXAMPLES = 1000  # of each setting of a task that has no end
SEQUENCE = 1024  # tokens that softmax attention reads at once, where nothing says what it was trained on


def run(
    model: str,
    corpus: str | None = None,
    split: Literal["train", "validation", "test"] = "validation",
    backend: Literal["torch", "jax", "numpy", "onnx"] | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float64", "float32", "bfloat16"] = "float32",
    device: str | None = None,
    limit: int = 0,
    window: int | None = None,
    documents: Literal["joined", "reset"] | None = None,
    task: str | None = None,
    task_options: dict[str, Any] | None = None,
) -> int:
    """Held-out loss of a trained model: the split is streamed through it in order, in constant memory.

    Args:
        model: folder of a run or of a checkpoint, a .safetensors file, or a .onnx file.
        corpus: name of a corpus, or a path; the one that it was trained on by default.
        split: which part of the corpus.
        backend: what computes; by default what is installed, and onnx for a .onnx file.
        tokenizer: its name, or the path of a tokenizer.json; the one that it was trained with by default.
        dtype: compute dtype.
        device: cpu or cuda; the backend's own choice by default.
        limit: predict only so many tokens; 0 predicts all. Of a task, so many examples of each setting, by default 1,000 or all there are.
        window: start anew after so many tokens; 0 reads one unbroken stream, the default but for softmax attention.
        documents: whether the state is carried over the starts of documents, or starts anew there; as it was trained by default.
        task: judge by a task instead of a corpus; the one that it was trained on by default, with its options.
        task_options: what differs from the task's published parameters.
    """
    path = model_file(expanded(model))
    reader = open_reader(path, backend, dtype, device)
    training = training_of(path)
    data = training.data if training else DataChoice()
    if task or (corpus is None and data.task):
        chosen = open_task(task or str(data.task), task_options if task or task_options else data.task_options)
        return _task_score(reader, path, chosen, split, limit)
    if task_options:
        raise InputError("task_options: given for a corpus; name the task in task, or leave them out")
    if corpus is None and training is None:
        raise InputError(f"corpus: nothing beside {path} says what it was trained on; give --corpus or --task")
    coder = load_tokenizer(tokenizer) if tokenizer else saved_tokenizer(path, reader.tokenizer)
    if corpus is not None:
        data = DataChoice(corpus=corpus, field=data.field, documents=data.documents, carry=data.carry)
    texts = load(data, coder)
    trained = data.carry or (training.seq_len if training else reader.seq_len or SEQUENCE)
    window = default_window(reader.config, trained) if window is None else window
    anew, bits = (data.documents != "joined" if documents is None else documents == "reset"), []
    for text in texts.corpora:
        check_corpus(reader.config, text)
        ids, starts = text.split(split), text.documents[split] if anew else None
        with Evaluating() as progress:
            score = evaluate(reader, ids, limit, window, progress, starts)
        unit = "pixels" if text.tokenizer is None else "tokens"
        print(f"{path} on {text.name}, {split}: {score.targets:,} {unit}, backend {reader.backend}")
        bits.append(score.bits)
        if text.tokenizer is None:
            print(f"bits per pixel   {score.bits:.6f}")
            continue
        # the first token is read, not predicted
        size = text.tokenizer.count_bytes(ids[1 : score.targets + 1])
        print(f"bits per {text.unit:<7} {score.nats / math.log(2) / max(1, size):.6f}")
        print(f"bits per token   {score.bits:.6f}")
        print(f"perplexity       {score.perplexity:.4f} a token")
    if len(bits) > 1:
        mean = float(texts.weights @ bits)
        print(f"all, weighted as they were trained on\nbits per token   {mean:.6f}\nperplexity       {2**mean:.4f} a token")
    return 0


def _task_score(reader: Reader, path: Path, task: Task, split: str, limit: int) -> int:
    """Print the task's metric on each setting of a split."""
    check_task(reader.config, task, (split,))
    if limit < 0:
        raise InputError(f"limit: {limit}; use a positive number of examples, or 0 for the default")
    print(f"{path} on {task.name}, {split}, backend {reader.backend}")
    for setting in task.settings(split):
        number = limit or (EXAMPLES if task.size(split, setting) is None else 0)
        with Evaluating() as progress:
            found = evaluate_task(reader, task, split, setting, number, progress)
        metric = f"{task.metric} {found.score:.6f}, " if task.metric else ""
        said = f"{metric}{found.bits:.6f} bits a target, {found.examples:,} examples"
        print(f"{setting:<16} {said}")
    return 0


def main(argv: list[str]) -> int:
    return call("eval", run, argv)
