"""Looking a number up in a phone book (Jelassi et al. 2024, "Repeat After Me", section 4.2), in bytes.

Lines `First Last: ten digits`, then two of them again as examples of what is wanted, then a name: what is asked is its number, digit by
digit. The metric counts numbers that are right from end to end. The names are ours; no person occurs twice in a book, which the published
code leaves to chance, as it leaves an empty line before the examples and one behind them, and begins numbers with 6 to 9.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from unisono_spec.contract import InputError

from unisono_tools.tasks.base import BLOCK, Drawn, Examples, chosen, once

_FIRST = (
    "Ada Alan Alice Amir Anna Arjun Astrid Aya Ben Bianca Boris Carla Carlos Chen Clara Daniel Dario Diana Elena Elif Emil Emma Erik Eva "
    "Farah Felix Fiona Gabriel Grace Hana Hans Hugo Ida Igor Ines Isaac Ivan Jana Jin John Julia Kai Karim Kira Lara Lena Leo Lin Lucas "
    "Maria Marta Max Mei Mila Nadia Nils Nina Noah Olga Omar Oscar Paula Pedro Petra Priya Quinn Rafael Rosa Ruth Samir Sara Sofia Sven "
    "Tara Theo Tomas Uma Vera Viktor Wei Xenia Yara Yusuf Zoe"
)
_LAST = (
    "Adler Ahmed Ali Bauer Becker Berg Brown Carter Castro Chan Cohen Costa Cruz Dahl Diaz Dubois Evans Ferrari Fischer Fox Garcia Gupta "
    "Haas Hansen Hill Ito Ivanov Jones Joshi Kaya Kim King Klein Kovac Kumar Lang Larsen Lee Lopez Lund Martin Meyer Moore Moreau Mori "
    "Nagy Nguyen Novak Olsen Ortiz Park Patel Perez Petrov Popov Quist Ramos Reed Rossi Sato Schmid Silva Singh Smith Sousa Stein Suzuki "
    "Tan Torres Turner Vega Vogel Wagner Walker Wang Weber White Wolf Wong Wu Yang Young Zhang"
)
FIRST, LAST = tuple(_FIRST.split()), tuple(_LAST.split())
DIGITS, SHOTS = 10, 2
LINE = max(map(len, FIRST)) + 1 + max(map(len, LAST)) + 2 + DIGITS + 1  # bytes of the longest


@dataclasses.dataclass(frozen=True)
class Phonebook(Drawn):
    """Settings are the number of lines."""

    train: tuple[int, ...] = (5, 10, 20)
    test: tuple[int, ...] = (20, 40, 80)
    learn: Literal["number", "numbers"] = "number"
    """What training asks: the wanted number, as is judged, or those of the examples too."""

    name = "phonebook"
    source = "arXiv:2402.01032"
    metric = "exact"

    def __post_init__(self) -> None:
        for field in ("train", "test"):
            lines = getattr(self, field)
            if not lines or min(lines) <= SHOTS or max(lines) > len(FIRST) * len(LAST):
                most = len(FIRST) * len(LAST)
                raise InputError(f"data.task_options.{field}: {list(lines)}; give numbers of lines from {SHOTS + 1} to {most}")
            once(lines, field)

    @property
    def vocab_size(self) -> int:
        return 256

    def settings(self, split: str) -> dict[str, float]:
        lines = self.test if split == "test" else self.train
        return {str(n): 1.0 if split == "test" else 1 / len(lines) for n in lines}

    def length(self, setting: str) -> int:
        return (int(setting) + SHOTS + 1) * LINE - 2  # the last digit is predicted, not read

    def block(self, setting: str, random: np.random.Generator, split: str) -> Examples:
        lines, total = int(setting), self.length(setting)
        people = chosen(random, BLOCK, len(FIRST) * len(LAST), lines)
        numbers = random.integers(0, 10, (BLOCK, lines, DIGITS))
        asked = chosen(random, BLOCK, lines, SHOTS + 1)  # the examples, then the one that is wanted
        inputs, targets = np.zeros((BLOCK, total), np.int64), np.zeros((BLOCK, total), np.int64)
        scored, ends = np.zeros((BLOCK, total), bool), np.zeros(BLOCK, np.int64)
        for row in range(BLOCK):
            book = [_line(person, number) for person, number in zip(people[row], numbers[row], strict=True)]
            text = "".join([*book, *(book[i] for i in asked[row])])[:-1]  # without the last line break
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
            end = len(ids) - 1
            inputs[row, :end], ends[row] = ids[:-1], end
            at, learned = end, split == "train" and self.learn == "numbers"
            for i in asked[row][::-1] if learned else asked[row][-1:]:
                targets[row, at - DIGITS : at], scored[row, at - DIGITS : at] = ids[at + 1 - DIGITS : at + 1], True
                at -= len(book[i])
        return Examples(inputs, targets, scored, np.arange(total) < ends[:, None])

    def shown(self, ids: np.ndarray) -> str:
        return bytes(ids.astype(np.uint8)).decode("latin-1")

    def right(self, predicted: np.ndarray, examples: Examples) -> tuple[float, float]:
        wrong = (predicted != examples.targets) & examples.scored
        return float((~wrong.any(1)).sum()), float(len(wrong))


def _line(person: int, number: np.ndarray) -> str:
    first, last = divmod(int(person), len(LAST))
    return f"{FIRST[first]} {LAST[last]}: {''.join(map(str, number))}\n"


TASK = Phonebook
