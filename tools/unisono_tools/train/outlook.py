"""What a run would be: sizes, counts and places, without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from unisono_spec.contract import count_params

from unisono_tools.config import TrainConfig, default_backend, processes
from unisono_tools.train import checkpoint
from unisono_tools.train.continuing import check_same_run, doubts
from unisono_tools.train.datamodule import TextDataModule
from unisono_tools.train.loop import initial, open_datamodule
from unisono_tools.train.task_datamodule import TaskDataModule

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
ARRAYS = 24  # of [B, T, D] that a layer keeps for its gradient, about


def outlook(train: TrainConfig) -> Iterator[tuple[str, str]]:
    """(what, how much). Raises InputError where the run would be refused before its first step."""
    config = train.validate()
    datamodule = open_datamodule(train, config)
    found = checkpoint.newest(train.folder)
    if found:
        check_same_run(train, datamodule, found[1], str(found[0]))
    elif train.init_from:
        initial(train, config)
    train = dataclasses.replace(train, steps=datamodule.steps)
    task = datamodule.task if isinstance(datamodule, TaskDataModule) else None
    lengths = [train.seq_len] if task is None else [task.length(setting) for setting in task.settings("train")]
    rows = train.batch_size * (1 if train.mode == "positions" else max(lengths))
    unit = "frames" if config.reads_frames else "tokens"
    yield "model", f"{train.model.preset}, {count_params(config):,} parameters"
    if task is not None:
        yield "task", f"{task.name} ({task.source}), judged by {task.metric or 'bits a target'}: {', '.join(task.settings('train'))}"
        yield "steps", f"{train.steps:,} of {train.batch_size:,} examples, at most {max(lengths):,} tokens each"
    texts = datamodule.mixture if isinstance(datamodule, TextDataModule) else None
    for one, weight in zip(texts.corpora, texts.weights, strict=True) if texts else ():
        documents = f" in {len(one.documents['train']):,} documents" if len(one.documents["train"]) > 1 else ""
        share = f", {weight:.1%} of the sequences" if weight < 1 else ""
        yield "corpus", f"{one.name}: {len(one.train):,} {unit} to learn from{documents}, {len(one.validation):,} to validate on{share}"
    if texts:
        epochs = train.steps * rows / max(1, sum(len(one.train) - 1 for one in texts.corpora))
        yield "steps", f"{train.steps:,} of {rows:,} {unit}: {train.steps * rows:,} in all, {epochs:.3g} epochs"
    for doubt in doubts(train, datamodule):
        yield "warning", doubt
    evaluations = -(-train.steps // train.eval_every)
    yield "evaluations", f"{evaluations:,}, one every {train.eval_every:,} steps; checkpoints every {train.checkpoint_every:,}"
    yield (
        "memory",
        f"about {gigabytes(memory(train, rows))} a device: weights, gradient, two moments and what the layers keep (a rough estimate for a "
        "GPU; plain operations, as on a CPU, take up to four times as much)",
    )
    each = (4 if train.ema else 3) * count_params(config) * BYTES[train.param_dtype]
    yield "disk", f"{gigabytes(each)} a checkpoint, at most {train.keep + 1} of them"
    yield "backend", f"{train.backend or default_backend(training=True)}, {train.dtype}"
    yield "written to", f"{train.folder.absolute()}" + (f", which continues {found[0].name}" if found else "")


def memory(train: TrainConfig, rows: int) -> int:
    """Bytes a device, about: four arrays of every parameter, five with averages; for one microbatch, what layers keep, logits and
    their gradient. Of kernels; plain operations of seven models of a million parameters took 0.7 to 3.7 times as much on a CPU."""
    config = train.model.config()
    devices = max(train.devices, processes()[1])
    microbatch = rows // train.accumulation // devices
    # computed again, all layers keep their inputs, and one of them the rest
    layers = config.n_updates + ARRAYS if train.gradient_checkpointing else (config.n_updates + 1) * ARRAYS
    kept = microbatch * (config.d_model * layers * BYTES[train.dtype] + config.output_size * (BYTES[train.dtype] + 8))
    held = (5 if train.ema else 4) * count_params(config) * BYTES[train.param_dtype]
    return held // (devices if train.parallel == "fsdp" else 1) + kept


def gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
