"""Multi-query associative recall (Arora et al. 2023, "Zoology", section 4 and appendix E).

A sequence begins with pairs of a key and a value. Keys come back later, at places drawn by a power law, and what is asked there is
the value that followed the key. What stands between is drawn from the whole vocabulary, or is 0, and nothing is asked there.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from unisono_spec.contract import InputError

from unisono_tools.tasks.base import BLOCK, Drawn, Examples, chosen, sized
from unisono_tools.trivial import Predictor


@dataclasses.dataclass(frozen=True)
class MQAR(Drawn):
    """Settings are T x pairs."""

    vocabulary: int = 8192
    """Keys are 1 … V/2 − 1, values V/2 … V − 1."""
    power: float = 0.01
    """Query i of the places left has probability ∝ i^(power − 1): small powers ask soon after the pairs."""
    between: Literal["random", "zero"] = "random"
    """What stands where nothing is asked: ids of the whole vocabulary, as Based has it (arXiv:2402.18668), or 0, as Zoology's figure 2."""
    train: tuple[str, ...] = ("64x4", "128x8", "256x16", "256x32", "256x64")
    shares: tuple[int, ...] = (5, 1, 1, 1, 1)
    """How many batches of each training setting there are, beside those of the others."""
    test: tuple[str, ...] = ("64x4", "64x8", "64x16", "128x32", "256x64", "512x64", "512x128", "1024x256")

    name = "mqar"
    source = "arXiv:2312.04927"

    def __post_init__(self) -> None:
        if self.vocabulary < 8 or self.vocabulary % 2:
            raise InputError(f"data.task_options.vocabulary: {self.vocabulary}; use an even number of 8 or more")
        if not 0 < self.power <= 1:
            raise InputError(f"data.task_options.power: {self.power}; use a number in (0, 1]")
        if self.train and (len(self.shares) != len(self.train) or min(self.shares) < 1):
            raise InputError(
                f"data.task_options.shares: {list(self.shares)}; give a positive integer for each of {len(self.train)} settings"
            )
        for field in ("train", "test"):
            for text, (length, pairs) in sized(getattr(self, field), field).items():
                if length % 2 or 4 * pairs > length or pairs >= self.vocabulary // 2:
                    raise InputError(
                        f"data.task_options.{field}: {text}; T is even and four times the pairs at least, which are fewer than half of "
                        f"the vocabulary, {self.vocabulary}"
                    )

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def settings(self, split: str) -> dict[str, float]:
        if split == "test":
            return dict.fromkeys(self.test, 1.0)
        return {name: share / sum(self.shares) for name, share in zip(self.train, self.shares, strict=True)}

    def length(self, setting: str) -> int:
        return int(setting.split("x")[0])

    def block(self, setting: str, random: np.random.Generator, split: str) -> Examples:
        length, pairs = map(int, setting.split("x"))
        half, space = self.vocabulary // 2, (length - 2 * pairs) // 2
        keys = 1 + chosen(random, BLOCK, half - 1, pairs)
        values = half + chosen(random, BLOCK, self.vocabulary - half, pairs)
        gaps = chosen(random, BLOCK, space, pairs, np.arange(1, space + 1) ** (self.power - 1.0))
        shape = (BLOCK, length)
        inputs = random.integers(0, self.vocabulary, shape) if self.between == "random" else np.zeros(shape, np.int64)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        targets, scored = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        at = 2 * pairs + 2 * gaps
        np.put_along_axis(inputs, at, keys, 1)
        np.put_along_axis(targets, at, values, 1)
        np.put_along_axis(scored, at, True, 1)
        return Examples(inputs, targets, scored)

    def trivial(self, setting: str) -> dict[str, Predictor]:
        return super().trivial(setting) | {"the first value": lambda e: np.broadcast_to(e.inputs[:, 1:2], e.targets.shape)}


TASK = MQAR
