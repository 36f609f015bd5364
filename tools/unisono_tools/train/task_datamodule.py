"""A task as what a run learns from: batches of examples, and an evaluation by the task's own metric."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from unisono_spec.contract import Config, InputError
from unisono_spec.contract.initial import generator
from unisono_spec.contract.memory import memory

from unisono_tools.ahead import Ahead
from unisono_tools.backends.base import Batch, Reader
from unisono_tools.config import TrainConfig
from unisono_tools.data.batches import in_epochs
from unisono_tools.evaluation import Progress, nll, part
from unisono_tools.tasks import Task, open_task
from unisono_tools.train.datamodule import Rows, Validation
from unisono_tools.train.loader import starting_state

MOST = 1 << 26  # numbers that a chunk of logits, or of what a layer makes of its tokens, may hold on a large machine
SHARE = 1 << 10  # bytes of the memory for each, on others


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Of `examples` examples of one setting: right of `of`, as the task counts; nats, summed over the `asked` places, or pixels."""

    examples: int
    right: float
    of: float
    nats: float
    asked: int

    @property
    def score(self) -> float:
        """The task's metric, 0 to 1."""
        return self.right / self.of

    @property
    def loss(self) -> float:
        """Mean nats of a place that is asked."""
        return self.nats / self.asked

    @property
    def bits(self) -> float:
        """Mean bits of a place that is asked."""
        return self.loss / math.log(2)


def evaluate_task(reader: Reader, task: Task, split: str, setting: str, number: int, progress: Progress | None = None) -> TaskScore:
    """The first `number` examples of a setting, or all that there are. InputError where the loss is not finite."""
    length, size = task.length(setting), task.size(split, setting)
    number = number if size is None else min(number or size, size)
    if number < 1:
        raise InputError(f"examples: {number}; {task.name} has no end, give a positive number of examples")
    config = reader.config
    chunk = max(1, min(MOST, memory() // SHARE) // (length * max(4 * config.d_model, 2 * task.frame_size or config.vocab_size)))
    found = [0.0, 0.0, 0.0, 0.0]
    for start in range(0, number, chunk):
        if progress is not None:
            progress(start / number)
        examples = task.examples(split, setting, np.arange(start, min(start + chunk, number)))
        logits, _ = reader.forward(examples.inputs, reader.init_state(len(examples.inputs), length))
        right, of = task.right(predicted(config, logits), examples)
        nats = float(nll(config, logits[examples.scored], examples.targets[examples.scored]).sum())
        if not math.isfinite(nats):
            raise InputError(f"evaluation: the loss is {nats} in {task.name} {setting}; the weights are damaged or have diverged")
        found = [a + b for a, b in zip(found, (right, of, nats, examples.scored.sum()), strict=True)]
    found[3] *= max(1, task.frame_size)
    return TaskScore(number, found[0], found[1], found[2], int(found[3]))


def predicted(config: Config, logits: np.ndarray) -> np.ndarray:
    """The likeliest ids [B, T], or means of frames [B, T, F]."""
    if config.predicts == "categorical":
        return logits.argmax(-1)
    z = logits.astype(np.float64)
    return np.split(z, 2, -1)[0] if config.predicts == "gaussian" else 0.5 + 0.5 * np.tanh(0.5 * z)


def check_task(config: Config, task: Task, splits: tuple[str, ...] = ("train", "validation")) -> None:
    """Raise InputError unless the model can read the task."""
    if task.frame_size:
        size = getattr(config, "frame_size", 0)
        if not config.reads_frames or size != task.frame_size or config.predicts != task.head:
            has = f"reads frames of {size} and predicts {config.predicts} ones" if config.reads_frames else "reads ids"
            remedy = f"--model.overrides.frame_size {task.frame_size} --model.overrides.frame_head {task.head}"
            raise InputError(
                f"data.task: {task.name} has frames of {task.frame_size} numbers, {task.head} ones, the model {has}; use CRAM's fixed "
                f"scheme with --model.overrides.codes frame {remedy}"
            )
    elif config.reads_frames or config.vocab_size < task.vocab_size:
        has = "reads frames" if config.reads_frames else f"has a vocab_size of {config.vocab_size}"
        raise InputError(
            f"data.task: {task.name} has {task.vocab_size} ids, the model {has}; set --model.overrides.vocab_size {task.vocab_size}"
        )
    longest = max(task.length(setting) for split in splits for setting in task.settings(split))
    if config.longest and longest > config.longest:
        raise InputError(f"data.task: {task.name} has {longest} tokens, the model reads {config.longest}; choose another or raise that")


class TaskDataModule:
    """Each batch is of one setting, drawn by its share; examples are numbered through, so that none comes twice before all came."""

    tokenizer = None

    def __init__(self, train: TrainConfig, config: Config, task: Task | None = None) -> None:
        self.train, self.config = train, config
        self.task = task = task or open_task(str(train.data.task), train.data.task_options)
        check_task(config, task)
        self.name, self.digest = task.name, task.digest
        self.shares = task.settings("train")
        self.metric = task.metric
        self.ahead: Ahead | None = None
        self.batch(0)
        if train.data.workers:
            self.ahead = Ahead(task, train.seed, train.data.workers)

    @property
    def steps(self) -> int:
        if not self.train.epochs:
            return self.train.steps
        sizes = [self.task.size("train", setting) for setting in self.shares]
        if None in sizes:
            raise InputError(f"epochs: {self.train.epochs}, but {self.task.name} is drawn without end; give steps")
        return max(1, math.ceil(self.train.epochs * sum(n for n in sizes if n is not None) / self.train.batch_size))

    def asked(self, step: int) -> tuple[str, np.ndarray]:
        """Of a step the setting, and the numbers of its examples [B]."""
        train, names = self.train, list(self.shares)
        setting = names[generator(train.seed, f"task.{step}").choice(len(names), p=np.array(list(self.shares.values())))]
        numbers = step * train.batch_size + np.arange(train.batch_size)
        size = self.task.size("train", setting)
        return setting, numbers if size is None else in_epochs(size, train.seed, numbers, together=self.task.together)[1]

    def batch(self, step: int) -> Batch:
        found = self.ahead.examples(step, self.asked) if self.ahead else self.task.examples("train", *self.asked(step), self.train.seed)
        state = starting_state(self.train, self.config, step)
        return Batch(found.inputs, found.targets, found.scored, state, valid=found.valid)

    def read(self, step: int) -> Rows:
        return {}

    def losses(self, batch: Batch, groups: tuple[float, ...]) -> Rows:
        return {}

    def validate(self, reader: Reader, progress: Progress | None = None) -> Validation:
        """The mean over settings, each weighted alike, of the metric and of the loss."""
        settings = list(self.task.settings("validation"))
        found = {
            setting: evaluate_task(
                reader, self.task, "validation", setting, self.train.data.eval_examples, part(progress, i, len(settings))
            )
            for i, setting in enumerate(settings)
        }
        loss, score = (float(np.mean([getattr(one, name) for one in found.values()])) for name in ("loss", "score"))
        name, each = f"validation_{self.metric or 'bits'}", {k: one.score if self.metric else one.bits for k, one in found.items()}
        rows = {"validation_loss": loss, name: score if self.metric else loss / math.log(2)}
        if len(found) > 1:
            rows |= {f"{name}.{setting}": value for setting, value in each.items()}
        if self.metric is None:
            return Validation(loss, rows, f"validation {loss / math.log(2):.4f} bits a target")
        return Validation(loss, rows, f"validation {self.metric} {score:.4f}, {loss:.4f} nats a target", score)
