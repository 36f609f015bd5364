"""The next frame of a recorded video.

By default two-photon microscopy of calcium in a mouse's cortex: 2,000 frames, of which the first 1,600 train, 200 validate and the last
200 test. What is asked at each frame is the one that follows: its grey values, standardised, or whether each pixel is bright
(`form=events`). The metric is the share of the variance about the training mean that the prediction explains.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.aside import written
from unisono_spec.contract.initial import generator

from unisono_tools.data import frames
from unisono_tools.data.cache import folder
from unisono_tools.tasks.base import Examples, Task
from unisono_tools.trivial import Predictor

SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
BRIGHT = 2.5  # an event: so many standard deviations above the pixel's mean in training


@dataclasses.dataclass(frozen=True)
class Video(Task):
    """One setting, `clips`."""

    dataset: str = "mouse-2p"
    """Or a .npy file of frames [T, H, W], also one that `unisono task video --write FILE` wrote."""
    side: int = 32
    """Pixels of a row and of a column, each the mean of those of the recording that lie in it."""
    frames: int = 100
    """Of a clip, each of which is followed by one more."""
    form: Literal["grey", "events"] = "grey"

    name = "video"
    source = "pypi:optinist"
    metric = "explained"

    def __post_init__(self) -> None:
        for field in ("side", "frames"):
            if getattr(self, field) < 1:
                raise InputError(f"data.task_options.{field}: {getattr(self, field)}; use a positive integer")
        if self.form not in ("grey", "events"):
            raise InputError(f"data.task_options.form: {self.form!r}; use grey or events")

    @property
    def vocab_size(self) -> int:
        return 0

    @property
    def frame_size(self) -> int:
        return self.side**2

    @property
    def head(self) -> str:
        return "gaussian" if self.form == "grey" else "bernoulli"

    def settings(self, split: str) -> dict[str, float]:
        return {"clips": 1.0}

    def length(self, setting: str) -> int:
        return self.frames

    def size(self, split: str, setting: str) -> int | None:
        return None if split == "train" else (len(self.part(split)) - 1) // self.frames  # the first one is read alone

    @property
    def content(self) -> str:
        return hashlib.sha256(self._grey.data).hexdigest()

    @property
    def _grey(self) -> np.ndarray:
        return frames.reduced(self.dataset, self.side, folder())

    def part(self, split: str) -> np.ndarray:
        """Frames of a split, [N, side²] float32; of those that judge the frame before, too, which the first prediction reads."""
        values = _values(self.dataset, self.side, self.form, folder())
        start, end = (round(share * len(values)) for share in SHARES[split])
        start = max(0, start - 1)
        if end - start <= self.frames:
            raise InputError(f"data.task_options.frames: {self.frames}; {split} has {end - start - 1} frames, use that many at most")
        return values[start:end]

    def examples(self, split: str, setting: str, numbers: np.ndarray, seed: int = 0) -> Examples:
        values, length = self.part(split), self.frames
        if split == "train":
            starts = [int(generator(seed, f"video.{n}").integers(len(values) - length)) for n in numbers]
        else:
            starts = [length * int(n) for n in numbers]
        clips = np.stack([values[s : s + length + 1] for s in starts])
        return Examples(clips[:, :-1], clips[:, 1:], np.ones(clips[:, 1:].shape[:2], bool))

    def right(self, predicted: np.ndarray, examples: Examples) -> tuple[float, float]:
        """predicted: the mean of each pixel, [B, T, F]."""
        y, mean = examples.targets.astype(np.float64), self.part("train").mean(dtype=np.float64)
        total = float(np.square(y - mean).sum())
        if not total:
            raise InputError(f"data.task_options.form: nothing happens in these {self.form}; name another, or another dataset")
        return total - float(np.square(y - predicted).sum()), total

    def trivial(self, setting: str) -> dict[str, Predictor]:
        mean = self.part("train").mean(0, dtype=np.float64)
        return {"mean image": lambda e: np.broadcast_to(mean, e.targets.shape), "persistence": lambda e: e.inputs}

    def baselines(self, split: str = "test", number: int = 1000) -> dict[str, dict[str, float]]:
        """The metric, and of events the bits a pixel of each pixel's rate in training (Krichevsky & Trofimov's estimate), too."""
        out = super().baselines(split, number)
        if self.form == "events":
            train = self.part("train")
            rate = (train.sum(0, dtype=np.float64) + 0.5) / (len(train) + 1)
            y = self.examples(split, "clips", np.arange(min(number, self.size(split, "clips") or number))).targets
            out["clips"]["rates, bits a pixel"] = -float(np.log2(np.where(y > 0, rate, 1 - rate)).mean())
        return out

    def write(self, path: Path, number: int) -> None:
        """As .npy, in pixels of `side`; the first `number` frames, or all."""
        with written(path) as file:
            np.save(file, self._grey[: number or None])


@functools.lru_cache(maxsize=4)
def _values(dataset: str, side: int, form: str, cache: Path) -> np.ndarray:
    """What a model reads: standardised by the training part as a whole, or 1 where a pixel is far above its own mean."""
    grey = frames.reduced(dataset, side, cache).astype(np.float64)
    grey = grey.reshape(len(grey), -1)
    train = grey[: round(SHARES["train"][1] * len(grey))]
    if form == "events":
        return (grey > train.mean(0) + BRIGHT * train.std(0)).astype(np.float32)
    return ((grey - train.mean()) / max(float(train.std()), np.finfo(np.float32).tiny)).astype(np.float32)


TASK = Video
