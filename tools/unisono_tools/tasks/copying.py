"""Copying a string (Jelassi et al. 2024, "Repeat After Me", section 3): letters, a mark, and the letters again.

In training a string's length is drawn uniformly, in test strings are longer too; what is asked is each letter of the copy, and the mark
that ends it. The metric counts strings that are right from end to end. One string an example, where the published code packs several.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from unisono_spec.contract import InputError

from unisono_tools.tasks.base import BLOCK, Drawn, Examples, once

START, COPY, END = 0, 1, 2  # ids before those of the letters


@dataclasses.dataclass(frozen=True)
class Copying(Drawn):
    """Settings are the longest string."""

    letters: int = 26
    shortest: int = 5
    longest: int = 20
    """Lengths of a string in training, from and to."""
    test: tuple[int, ...] = (20, 50, 100)
    """Lengths of the strings that test has: each of just that length."""

    name = "copying"
    source = "arXiv:2402.01032"
    metric = "exact"

    def __post_init__(self) -> None:
        for field, value in (("letters", self.letters), ("shortest", self.shortest), ("test", min(self.test, default=0))):
            if value < 1:
                raise InputError(f"data.task_options.{field}: {value}; use a positive integer")
        once(self.test, "test")
        if self.longest < self.shortest:
            raise InputError(f"data.task_options.longest: {self.longest}; use {self.shortest}, which is shortest, or more, or lower that")

    @property
    def vocab_size(self) -> int:
        return 3 + self.letters

    def settings(self, split: str) -> dict[str, float]:
        return dict.fromkeys(map(str, self.test if split == "test" else (self.longest,)), 1.0)

    def length(self, setting: str) -> int:
        return 2 * int(setting) + 2  # start, string, mark, string

    def block(self, setting: str, random: np.random.Generator, split: str) -> Examples:
        most, total = int(setting), self.length(setting)
        sizes = np.full(BLOCK, most) if split == "test" else random.integers(self.shortest, most + 1, BLOCK)
        strings = random.integers(3, 3 + self.letters, (BLOCK, most))
        inputs = np.full((BLOCK, total), END)
        targets, scored = inputs.copy(), np.zeros((BLOCK, total), bool)
        for row, (n, string) in enumerate(zip(sizes.tolist(), strings, strict=True)):
            inputs[row, : 2 * n + 2] = [START, *string[:n], COPY, *string[:n]]
            targets[row, n + 1 : 2 * n + 2] = [*string[:n], END]
            scored[row, n + 1 : 2 * n + 2] = True
        return Examples(inputs, targets, scored, np.arange(total) < 2 * sizes[:, None] + 2)

    def shown(self, ids: np.ndarray) -> str:
        return "".join("<|."[i] if i <= END else chr(62 + i) for i in ids)

    def right(self, predicted: np.ndarray, examples: Examples) -> tuple[float, float]:
        wrong = (predicted != examples.targets) & examples.scored
        return float((~wrong.any(1)).sum()), float(len(wrong))


TASK = Copying
