"""The configuration of a training run: dataclasses that YAML files and command lines fill, validated all at once."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from unisono_spec.contract import ANY, Config, InputError, preset
from unisono_spec.contract.memory import check_fits
from unisono_spec.contract.plain import build, expanded

LAUNCH = "start the processes by torchrun, which sets it, or unset WORLD_SIZE"
BACKENDS = ("torch", "jax", "numpy", "onnx")
WORKERS = 64  # at most


def processes() -> tuple[int, int]:
    """This process's number and how many train one model together, as torchrun says; alone, (0, 1)."""
    size = launched("WORLD_SIZE", 1)
    if size < 2:
        return 0, 1
    if (rank := launched("RANK", 0)) >= size:
        raise InputError(f"RANK: {rank} in the environment, of WORLD_SIZE {size}; {LAUNCH}")
    return rank, size


def launched(name: str, default: int | None = None) -> int:
    """A number that torchrun sets in the environment of each process. Without a default it must be there."""
    text = os.environ.get(name) or str("" if default is None else default)
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{name}: {text!r} in the environment, where a number belongs; {LAUNCH}")
    return int(text)


def default_backend(training: bool = False) -> str:
    """The first of torch and jax that is installed, else numpy, which reads and does not train."""
    found = [name for name in BACKENDS[:2] if importlib.util.find_spec(name)]
    if training and not found:
        raise InputError("backend: neither torch nor jax is installed here; pip install 'unisono[torch]' or 'unisono[jax]'")
    return found[0] if found else "numpy"


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """Which model to train."""

    preset: str = "cram-demo"
    """Name of a preset; `unisono list` shows them all."""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Config fields that differ from the preset, as in --model.overrides.d_model 64."""

    def config(self) -> Config:
        return preset(self.preset, **self.overrides)


@dataclasses.dataclass(frozen=True)
class DataChoice:
    """What to train on."""

    corpus: str = "sotu"
    """Name of a corpus, hf:owner/name[:config][:field], or a path: a file, a folder, a pattern such as data/*.txt, or a .npy of frames."""
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)
    """Several corpora and the share of the sequences from each, instead of `corpus`, as in '{sotu: 3, notes/*.txt: 1}'."""
    tokenizer: str = "bytes"
    """bytes, chars (learned from the corpus), gpt2, the path of a tokenizer.json, or owner/name on the hub."""
    field: str = "text"
    """Where the text stands in JSON lines and in rows of hub sets; a.b is b in a."""
    validation: str | None = None
    """Another corpus to validate on; then all of `corpus` trains."""
    limit: int | None = None
    """Read at most so many bytes of the corpus."""
    task: str | None = None
    """Instead of a corpus, a task of `unisono_tools.tasks`: few of its tokens are asked, and its own metric judges."""
    task_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The task's parameters that differ from the published ones."""
    eval_examples: int = 256
    """Examples of each setting of a task at each evaluation."""
    workers: int = 0
    """Processes that draw a task's training examples ahead of their steps; 0 draws them when they are read. They are the same."""
    precomputed: str | None = None
    """Folder that `unisono precompute` wrote, for mode=positions."""
    documents: Literal["joined", "reset", "truncated"] = "joined"
    """Sequences read across the starts of documents; or the state is reset there; or each holds the beginning of one document alone."""
    order: Literal["random", "shuffled", "streamed"] = "random"
    """Where sequences start: anywhere, drawn with the seed; or one after the other, shuffled anew in each epoch; or where those of the
    batch before ended, with the state carried over and the gradient cut there (truncated backpropagation through time)."""
    carry: int = 0
    """With order=streamed: tokens after which the state starts anew, a multiple of seq_len. 0 carries it to the end of the stream."""
    eval_tokens: int = 65536
    """Validation tokens read at each evaluation; 0 reads the whole split."""
    eval_window: int | None = None
    """Evaluation starts anew after so many tokens; 0 reads one unbroken stream, the default but for softmax attention (seq_len)."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019), on matrices only: the contract says which parameters decay."""

    lr: float = 2e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest global norm of the accumulated gradient; 0 does not clip."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then down to a share of the peak."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up; constant stays at the peak."""
    warmup_steps: int = 100
    final_fraction: float = 0.1
    """Learning rate at the last step, as a share of the peak."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: ModelChoice = dataclasses.field(default_factory=ModelChoice)
    data: DataChoice = dataclasses.field(default_factory=DataChoice)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    mode: Literal["sequences", "positions"] = "sequences"
    """Minibatches of whole sequences, or of positions of a precomputed ξ (Algorithm 1; fixed scheme)."""
    steps: int = 1000
    epochs: float = 0.0
    """Instead of steps: how often the training split is read, which data.order=shuffled then does to the token."""
    max_minutes: float = 0.0
    """Stop with a checkpoint after so long; 0 never does. The same command continues."""
    patience: int = 0
    """Stop after so many evaluations without a lower validation loss; 0 never does."""
    enough: float = 0.0
    """Stop at the first evaluation of a task whose metric is as good as this; 0 never does."""
    batch_size: int = 16
    """Sequences a step (positions a step with mode=positions)."""
    seq_len: int = 256
    """Tokens a sequence."""
    accumulation: int = 1
    """Parts that a batch is computed in, for memory; the gradient is that of the whole batch."""
    eval_every: int = 250
    checkpoint_every: int = 250
    log_every: int = 10
    keep: int = 2
    """Newest checkpoints to keep, besides the best."""
    seed: int = 0
    """Decides initial weights, data order, dropout and position offsets."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    """Compute dtype. Parameters and moments are float32 (float64 with float64); float16 scales the loss and skips what overflows."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, say 0.999, which is then evaluated and saved beside them; 0 keeps none."""
    gradient_checkpointing: bool = False
    """Keep each block's inputs alone, and compute the block again for the gradient: less memory, a third more work."""
    compile: bool = False
    """torch.compile the step; jax always does."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Replay forward and backward as one CUDA graph: the same bits, without what launches cost the host; auto, where it can be (torch)."""
    backend: Literal["torch", "jax"] | None = None
    """The default is the first of them that is installed."""
    device: str | None = None
    """cpu or cuda; the default is the backend's own choice."""
    implementation: str = "auto"
    """auto or plain; triton with torch, on a GPU (docs/kernels.md)."""
    devices: int = 1
    """Devices that share each batch: processes that the command starts (torch), or what this process sees (jax)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several devices hold: all parameters each, or a share of each parameter and of its moments."""
    context: int = 1
    """Of several devices, so many share each sequence, and hand the state from one to the next (models of a fixed state)."""
    threads: int = 0
    """CPU threads; 0 leaves the number to the backend. Only equal numbers give equal bits."""
    out: str = "runs/unisono"
    """Folder of the run. A run that is there already is continued."""
    wandb_project: str | None = None
    """Log to this project of Weights & Biases too; WANDB_MODE=offline keeps it on this machine."""
    init_from: str | None = None
    """Checkpoint whose weights this run starts from."""

    @property
    def folder(self) -> Path:
        return expanded(self.out)

    @property
    def param_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def validate(self) -> Config:
        """The model's config; one InputError that lists every problem there is."""
        problems = list(self._problems())
        config = None
        try:
            config = self.model.config()
            problems += self._disagreements(config)
        except InputError as error:
            problems.append(str(error))
        if problems or config is None:
            raise InputError("; ".join(problems))
        return config

    def doubts(self) -> Iterator[str]:
        """What is allowed, and hardly meant."""
        if self.schedule.warmup_steps >= self.steps:
            yield (
                f"schedule.warmup_steps: {self.schedule.warmup_steps} of {self.steps} steps, the learning rate never stops rising; "
                "shorten the warm-up or raise steps"
            )

    def _problems(self) -> Iterator[str]:
        opt, schedule = self.optimizer, self.schedule
        for name, value, least in (
            ("steps", self.steps, 1),
            ("batch_size", self.batch_size, 1),
            ("seq_len", self.seq_len, 1),
            ("accumulation", self.accumulation, 1),
            ("eval_every", self.eval_every, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("log_every", self.log_every, 1),
            ("keep", self.keep, 1),
            ("patience", self.patience, 0),
            ("seed", self.seed, 0),
            ("threads", self.threads, 0),
            ("devices", self.devices, 1),
            ("context", self.context, 1),
            ("data.eval_tokens", self.data.eval_tokens, 0),
            ("data.carry", self.data.carry, 0),
            ("data.eval_examples", self.data.eval_examples, 1),
            ("data.eval_window", self.data.eval_window or 0, 0),
            ("schedule.warmup_steps", schedule.warmup_steps, 0),
        ):
            if value < least:
                yield f"{name}: {value} is too small, use an integer ≥ {least}"
        for name, value, fits, remedy in (
            ("optimizer.lr", opt.lr, 0 < opt.lr <= 1e30, "use a positive number that float32 holds"),
            ("enough", self.enough, 0 <= self.enough <= 1, "use a share in (0, 1], or 0 to do all steps"),
            ("ema", self.ema, 0 <= self.ema < 1, "use a number in [0, 1), say 0.999"),
            ("epochs", self.epochs, self.epochs >= 0, "use a positive number, or 0 to count steps"),
            ("max_minutes", self.max_minutes, self.max_minutes >= 0, "use a positive number, or 0 for no limit"),
            ("data.workers", self.data.workers, 0 <= self.data.workers <= WORKERS, f"use 0 to {WORKERS} processes"),
            ("optimizer.beta1", opt.beta1, 0 <= opt.beta1 < 1, "use a number in [0, 1)"),
            ("optimizer.beta2", opt.beta2, 0 <= opt.beta2 < 1, "use a number in [0, 1)"),
            ("optimizer.eps", opt.eps, opt.eps > 0, "use a positive number"),
            ("optimizer.weight_decay", opt.weight_decay, opt.weight_decay >= 0, "use a number ≥ 0"),
            ("optimizer.clip", opt.clip, opt.clip >= 0, "use a positive number, or 0 not to clip"),
            ("schedule.final_fraction", schedule.final_fraction, 0 <= schedule.final_fraction <= 1, "use a number in [0, 1]"),
        ):
            if not (fits and math.isfinite(value)):
                yield f"{name}: {value} is not valid, {remedy}"
        named = {"out": self.out, "init_from": self.init_from, "device": self.device, "wandb_project": self.wandb_project}
        for name, text in (named | {"data.precomputed": self.data.precomputed, "data.tokenizer": self.data.tokenizer}).items():
            if text is not None and not text.strip():
                yield f"{name}: {text!r} names nothing; give a name, or leave it out"
        rows = self.batch_size * (self.seq_len + 1 if self.mode == "sequences" else 1)
        try:  # 64-bit places and 64-bit ids
            check_fits(16 * rows, f"batch_size, seq_len: {rows} ids a step", "use less of either")
        except InputError as error:
            yield str(error)
        if self.accumulation >= 1 and self.batch_size % self.accumulation:
            yield f"accumulation: {self.accumulation} does not divide batch_size {self.batch_size}, use a divisor of it"
        if (self.mode == "positions") != (self.data.precomputed is not None):
            given = f"data.precomputed: {self.data.precomputed!r} with mode={self.mode}"
            yield f"{given}, give the folder of `unisono precompute` together with mode=positions"

        yield from self._data_problems()
        yield from self._device_problems()

    def _device_problems(self) -> Iterator[str]:
        if self.devices > 1 and self.devices % max(1, self.context):
            yield f"context: {self.context} does not divide devices {self.devices}, use a divisor of it"
        elif self.devices > 1 and self.batch_size % (parts := max(1, self.accumulation) * self.devices // max(1, self.context)):
            yield f"batch_size: {self.batch_size} does not divide into {parts} parts, accumulation times devices; use a multiple of {parts}"
        if self.context > 1:
            for name, clashes, remedy in (
                ("parallel", self.parallel == "fsdp", "use ddp"),
                ("mode", self.mode == "positions", "use sequences"),
                ("data.order", self.data.order == "streamed", "use random or shuffled"),
                ("seq_len", self.seq_len % self.context != 0, "use a multiple of context"),
            ):
                if clashes:
                    value = self.data.order if name == "data.order" else getattr(self, name)
                    yield f"{name}: {value} with context={self.context}, whose devices share each sequence; {remedy}"

    def _data_problems(self) -> Iterator[str]:
        data = self.data
        streamed = data.order == "streamed"
        for name, share in data.mixture.items():
            if not 0 < share < math.inf:
                yield f"data.mixture.{name}: {share!r}; give the share of this corpus, a positive number"
        if data.mixture and data.corpus != DataChoice.corpus:
            yield f"data.mixture: given beside data.corpus {data.corpus!r}; name it in the mixture, with its share"
        if data.task and (data.mixture or data.validation or data.order == "streamed" or self.mode == "positions"):
            yield f"data.task: {data.task} has examples of its own; leave out data.mixture, data.validation, data.order and mode"
        if self.enough and not data.task:
            yield f"enough: {self.enough} without data.task, whose metric it is of; leave it out, or use patience"
        for name, given in (("task_options", data.task_options), ("workers", data.workers)):
            if given and not data.task:
                yield f"data.{name}: given without data.task; name the task"
        if self.mode == "positions" and (data.mixture or data.order != "random" or data.documents != "joined"):
            yield "mode: positions draws single positions of one corpus; leave out data.mixture, data.order and data.documents"
        if streamed and data.documents == "truncated":
            yield "data.documents: truncated with order=streamed, which carries on into the next sequence; use joined or reset"
        if data.carry and not streamed:
            yield f"data.carry: {data.carry} with order={data.order}; only data.order=streamed carries a state from batch to batch"
        if streamed and self.seq_len > 0 and data.carry % self.seq_len:
            yield f"data.carry: {data.carry} is no multiple of seq_len {self.seq_len}; use one"

    def _disagreements(self, config: Config) -> Iterator[str]:
        data, limit = self.data, config.longest
        if self.context > 1 and any(ANY in state.shape for state in config.states().values()):
            yield f"context: {self.context}, and this model's state grows with what it reads (softmax attention); use context=1"
        kept = any(ANY in state.shape for state in config.states().values())
        if data.order == "streamed" and ((kept and not data.carry) or (limit and not 0 < data.carry <= limit)):
            why = f"has {limit} positions" if limit else "keeps every token that it reads"
            most = (limit or 4 * self.seq_len) // max(1, self.seq_len) * self.seq_len
            yield f"data.carry: {data.carry}, and this model {why}; give the tokens after which its state starts anew, say {most}"
        if self.mode == "positions" and not config.precomputable:
            yield "mode: positions needs a model whose ξ depends on the data alone, use scheme=fixed with codes=binary or frame"


def to_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def dump(config: TrainConfig) -> str:
    """As YAML that `unisono train --config` reads."""
    from unisono_tools.reading import dump_yaml

    return dump_yaml(to_dict(config))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`. InputError where a field is unknown or has the wrong type."""
    return build(TrainConfig, values, "")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; tuples as the lists that JSON makes of them."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        plain = list(value) if isinstance(value, tuple) else value
        out |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": plain}
    return out
