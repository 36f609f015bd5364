"""What a task is."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.initial import generator
from unisono_spec.contract.memory import check_fits

from unisono_tools import trivial
from unisono_tools.data import labelled
from unisono_tools.data.labelled import Labelled
from unisono_tools.trivial import Predictor

BLOCK = 64  # examples drawn at once
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Examples:
    """inputs, targets: ids [B, T] int64, or frames [B, T, F] float32; what is asked at each place is not what follows, unless the task
    says so.

    scored: [B, T] bool, the places that are asked. valid: [B, T] bool, false behind the end of shorter examples; None: all are read.
    """

    inputs: np.ndarray
    targets: np.ndarray
    scored: np.ndarray
    valid: np.ndarray | None = None

    def __getitem__(self, index: slice | np.ndarray) -> Examples:
        valid = None if self.valid is None else self.valid[index]
        return Examples(self.inputs[index], self.targets[index], self.scored[index], valid)

    @staticmethod
    def joined(blocks: list[Examples]) -> Examples:
        arrays = zip(*[(p.inputs, p.targets, p.scored) for p in blocks], strict=True)
        marks = [np.ones(p.inputs.shape, bool) if p.valid is None else p.valid for p in blocks]
        valid = None if all(p.valid is None for p in blocks) else np.concatenate(marks)
        inputs, targets, scored = (np.concatenate(a) for a in arrays)
        return Examples(inputs, targets, scored, valid)


class Task(abc.ABC):
    """A frozen dataclass: its fields are its parameters, their defaults the published ones.

    A setting is a kind of example with a length of its own ("64x4"), of which a split may have several. Examples are numbered; each
    is a function of (seed, split, setting, number) alone, whatever batch it stands in. Those that judge have seed 0.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    by_class: ClassVar[bool] = False
    """What is asked is the number of a class, at the last token."""
    pictured: ClassVar[bool] = False
    """Ids are the grey values of a square picture, row by row."""
    metric: ClassVar[str | None] = "accuracy"
    """What `right` counts, of which more is better; None where the loss decides, in bits a target."""
    together: ClassVar[int] = 1
    """Examples that stay side by side in an epoch's order, where drawing one draws them all."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Ids are less than this; 0 of frames."""

    @property
    def frame_size(self) -> int:
        """Numbers of a frame; 0 of ids."""
        return 0

    @property
    def head(self) -> str:
        """What is predicted: "categorical" of ids, "gaussian" or "bernoulli" of frames."""
        return "categorical"

    @abc.abstractmethod
    def settings(self, split: str) -> dict[str, float]:
        """The settings of a split, and the share of the training batches that each has."""

    @abc.abstractmethod
    def length(self, setting: str) -> int:
        """T."""

    @abc.abstractmethod
    def examples(self, split: str, setting: str, numbers: np.ndarray, seed: int = 0) -> Examples:
        """The examples with these numbers [B]."""

    def size(self, split: str, setting: str) -> int | None:
        """How many examples there are; None: without end."""
        return None

    def right(self, predicted: np.ndarray, examples: Examples) -> tuple[float, float]:
        """The metric as a quotient: what counts for it, and of how much. predicted: likeliest ids [B, T], or means of frames."""
        return float((predicted == examples.targets)[examples.scored].sum()), float(examples.scored.sum())

    def shown(self, ids: np.ndarray) -> str:
        """Ids [n] for a reader; of a task by class its answers are numbers."""
        return " ".join(map(str, ids))

    def trivial(self, setting: str) -> dict[str, Predictor]:
        """Predictors that read nothing of what order tells, by their names: what a model must beat in this setting."""
        return {"majority": trivial.majority(self)}

    def baselines(self, split: str = "test", number: int = 1000) -> dict[str, dict[str, float]]:
        """By setting, what they reach on its first `number` examples: the metric, or bits a target where there is none."""
        out: dict[str, dict[str, float]] = {}
        for setting in self.settings(split):
            found = dict.fromkeys(predictors := self.trivial(setting), (0.0, 0.0))
            for examples in trivial.some(self, split, setting, number):
                for name, predict in predictors.items():
                    right, of = self.right(predict(examples), examples)
                    found[name] = found[name][0] + right, found[name][1] + of
            out[setting] = {name: right / of for name, (right, of) in found.items()}
        return out

    def write(self, path: Path, number: int) -> None:
        """The data set as a file that `dataset` may name; `number` examples of each split, or all for 0. InputError where there is none."""
        raise InputError(f"write: {self.name} has no data set; its examples are drawn wherever they are needed")

    @property
    def digest(self) -> str:
        """Of all that examples depend on but the seed: the content of a data set, not its name."""
        fields = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        if self.content is not None:
            fields["dataset"] = self.content
        return hashlib.sha256(f"{self.name} {json.dumps(fields, sort_keys=True)}".encode()).hexdigest()

    @property
    def content(self) -> str | None:
        """Digest of the data set that the field `dataset` names; None of a task without one."""
        return None


class Drawn(Task):
    """A task whose examples are drawn, `block_size` at once."""

    block_size: ClassVar[int] = BLOCK

    @abc.abstractmethod
    def block(self, setting: str, random: np.random.Generator, split: str) -> Examples:
        """`block_size` examples, drawn."""

    def examples(self, split: str, setting: str, numbers: np.ndarray, seed: int = 0) -> Examples:
        blocks, places = np.divmod(numbers, self.block_size)
        kinds, which = np.unique(blocks, return_inverse=True)
        found = Examples.joined([_blocks(self, split, setting, int(b), seed) for b in kinds])
        return found[which * self.block_size + places]


class OfSet(Task):
    """A task of documents or pictures with a class each, which its field `dataset` names."""

    @property
    @abc.abstractmethod
    def data(self) -> Labelled:
        """The set; InputError where the task cannot be asked of it."""

    @property
    def content(self) -> str:
        return self.data.digest

    def write(self, path: Path, number: int) -> None:
        labelled.write(self.data.first(number) if number else self.data, path)


def classified(inputs: np.ndarray, labels: np.ndarray, ends: np.ndarray | None = None) -> Examples:
    """inputs [B, T] with labels [B]: the class is asked at the last place, that before `ends` [B] where examples end early."""
    rows, last = np.arange(len(inputs)), inputs.shape[1] - 1 if ends is None else ends - 1
    targets, scored = np.zeros(inputs.shape, np.int64), np.zeros(inputs.shape, bool)
    targets[rows, last], scored[rows, last] = labels, True
    return Examples(inputs.astype(np.int64), targets, scored, None if ends is None else np.arange(inputs.shape[1]) < ends[:, None])


@functools.lru_cache(maxsize=8)
def _blocks(task: Drawn, split: str, setting: str, block: int, seed: int) -> Examples:
    numbers = task.block_size * (task.length(setting) + task.vocab_size)
    check_fits(
        32 * numbers, f"data.task: {task.block_size} examples of {task.name} {setting}", "choose shorter ones, or a smaller vocabulary"
    )
    return task.block(setting, generator(seed, f"{task.name}.{split}.{setting}.{block}"), split)


def once(values: tuple[Any, ...], field: str) -> None:
    """InputError, which names the field, where a value stands there twice."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise InputError(f"data.task_options.{field}: {value} comes twice in {list(values)}; give each setting once")


def sized(texts: tuple[str, ...], field: str) -> dict[str, tuple[int, int]]:
    """Settings written as 64x4: two positive integers by name. InputError, which names the field, on anything else."""
    once(texts, field)
    out = {}
    for text in texts:
        first, cross, second = text.partition("x")
        if not (cross and first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            raise InputError(f"data.task_options.{field}: {text!r}; write two positive integers, as in 64x4")
        out[text] = (int(first), int(second))
    if not out:
        raise InputError(f"data.task_options.{field}: empty; give one setting at least, as in 64x4")
    return out


def chosen(random: np.random.Generator, rows: int, among: int, number: int, weights: np.ndarray | None = None) -> np.ndarray:
    """`number` different integers below `among` for each row, in the order of their drawing, [rows, number] int64.

    weights [among]: how likely each is at each draw, among those left; as numpy's choice without replacement. Those with the smallest
    of independent exponential times, whose rates are the weights, are such a draw (Efraimidis & Spirakis 2006).
    """
    if weights is None and number**2 < among:
        # rows whose integers all differ, which most do: the others are drawn anew
        found = random.integers(0, among, (rows, number))
        while len(again := np.flatnonzero((np.diff(np.sort(found, 1), axis=1) == 0).any(1))):
            found[again] = random.integers(0, among, (len(again), number))
        return found
    times = random.standard_exponential((rows, among)) / (1 if weights is None else weights)
    first = np.argpartition(times, number - 1, axis=1)[:, :number]
    order = np.argsort(np.take_along_axis(times, first, 1), axis=1)
    return np.take_along_axis(first, order, 1)
