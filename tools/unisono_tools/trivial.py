"""What a model must beat: predictors of a task that read nothing of what the order of tokens tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from unisono_tools.tasks.base import Examples, Task

Predictor = Callable[["Examples"], np.ndarray]  # → ids at each place [B, T]
Features = Callable[["Examples"], np.ndarray]  # → numbers of each example [B, n]
LEARNED = 10_000  # training examples that a predictor is made of, at most
AT_ONCE = 1 << 20  # tokens of examples that are held at once
RIDGES = (1e-4, 1e-2, 1.0)  # shares of the features' mean square


def some(task: Task, split: str, setting: str, number: int) -> Iterator[Examples]:
    """The first `number` examples of a setting, or all that there are, in pieces."""
    size = task.size(split, setting)
    number = number if size is None else min(number, size)
    piece = max(1, AT_ONCE // (task.length(setting) * max(1, task.frame_size)))
    for start in range(0, number, piece):
        yield task.examples(split, setting, np.arange(start, min(start + piece, number)))


def majority(task: Task, number: int = 1000) -> Predictor:
    """Always what training asks for most often."""
    counts = np.zeros(task.vocab_size, np.int64)
    for setting in task.settings("train"):
        for examples in some(task, "train", setting, number):
            counts += np.bincount(examples.targets[examples.scored], minlength=len(counts))
    return lambda examples: np.full(examples.targets.shape, counts.argmax())


def bag(examples: Examples) -> np.ndarray:
    """How often each id below 256 occurs, log(1 + n): [B, 256]; what stands where does not matter."""
    valid = np.ones(examples.inputs.shape, bool) if examples.valid is None else examples.valid
    return np.log1p([np.bincount(row[kept], minlength=256) for row, kept in zip(examples.inputs, valid, strict=True)])


def places(examples: Examples) -> np.ndarray:
    """The values themselves, each by its place."""
    return examples.inputs / 255


def linear(task: Task, features: Features, number: int = LEARNED) -> Predictor:
    """The class at the last token by least squares with a ridge, which validation chooses (Hoerl & Kennard 1970)."""
    (setting,) = task.settings("train")
    x, y = _table(task, "train", setting, features, number)
    judge, truth = _table(task, "validation", setting, features, number)
    wanted = np.eye(y.max() + 1)[y]
    gram, product = x.T @ x, x.T @ wanted
    scale = np.trace(gram) / len(gram)
    fits = [np.linalg.solve(gram + ridge * scale * np.eye(len(gram)), product) for ridge in RIDGES]
    weights = max(fits, key=lambda w: float(((judge @ w).argmax(1) == truth).mean()))

    def predict(examples: Examples) -> np.ndarray:
        return np.broadcast_to((_with_one(features(examples)) @ weights).argmax(1)[:, None], examples.targets.shape)

    return predict


def _table(task: Task, split: str, setting: str, features: Features, number: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = [(_with_one(features(e)), e.targets[e.scored]) for e in some(task, split, setting, number)]
    return np.concatenate([x for x, _ in pieces]), np.concatenate([y for _, y in pieces])


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], 1)
