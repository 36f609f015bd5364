"""ListOps (Nangia & Bowman 2018; in the lengths of Tay et al. 2021, "Long Range Arena", section 2.2): the value of nested lists of digits.

A node at depth d, the root's being 1, is an operator with 2 to `max_args` children if d < `max_depth` and one draw in four says so, else
a digit. A tree is kept if it is between the lengths, an operator and its closing mark counting two and a digit one. What is asked, at the
last token, is the value of the whole: one of ten classes. That no tree comes twice is left to chance, which at these lengths brings none.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from unisono_spec.contract import InputError

from unisono_tools.tasks.base import BLOCK, Drawn, Examples
from unisono_tools.trivial import Predictor, bag, linear

MIN, MAX, MED, SM = range(10, 14)  # ids of operators, after those of digits; the median is cut to an integer, the sum taken modulo 10
CLOSE = 14
SHARE = 0.25  # of nodes that are operators, where they may be
TRIES = 1024  # trees drawn at once, of which about 88 are kept at the published parameters: a block's worth and few more
WIDEST = 100  # arguments of a list, at most
PATIENCE = 150  # times TRIES for each tree that is kept, at most
MOST = 1 << 24  # nodes of a level that are held; at the published parameters there are far fewer
SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}


@dataclasses.dataclass(frozen=True)
class ListOps(Drawn):
    """One setting, `lists`."""

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    """Trees are longer than this."""
    max_length: int = 2000
    """And shorter than this."""

    name = "listops"
    source = "arXiv:2011.04006"
    by_class = True
    together = BLOCK

    def __post_init__(self) -> None:
        for field, least in (("max_depth", 2), ("max_args", 2), ("min_length", 1), ("max_length", self.min_length + 2)):
            if getattr(self, field) < least:
                raise InputError(f"data.task_options.{field}: {getattr(self, field)}; use an integer ≥ {least}")
        if self.max_args > WIDEST:
            raise InputError(f"data.task_options.max_args: {self.max_args}; use an integer from 2 to {WIDEST}")
        # the largest tree, and the smallest, must be able to lie between the lengths
        most = (self.max_depth - 1) * np.log(self.max_args)
        if most < np.log(self.min_length + 1) - np.log(2):
            raise InputError(
                f"data.task_options.min_length: {self.min_length}; no tree of this depth is longer, raise max_depth or max_args"
            )
        if self.max_length < 6:
            raise InputError(f"data.task_options.max_length: {self.max_length}; the shortest list has 4 tokens, use an integer ≥ 6")

    @property
    def vocab_size(self) -> int:
        return 15

    def settings(self, split: str) -> dict[str, float]:
        return {"lists": 1.0}

    def length(self, setting: str) -> int:
        return self.max_length - 1

    def size(self, split: str, setting: str) -> int | None:
        return SIZES[split]

    def block(self, setting: str, random: np.random.Generator, split: str) -> Examples:
        found: list[tuple[np.ndarray, int]] = []
        drawn = 0
        while len(found) < BLOCK:
            if drawn > PATIENCE * (1 + len(found)):
                raise InputError(
                    f"data.task_options.min_length: {self.min_length}; hardly any tree is longer, and shorter than max_length, "
                    f"{self.max_length}, with max_args {self.max_args} and max_depth {self.max_depth}; lower it, or use another "
                    "max_args, 10 say"
                )
            found += self._trees(random)
            drawn += 1
        total = self.length(setting)
        inputs, targets = np.zeros((BLOCK, total), np.int64), np.zeros((BLOCK, total), np.int64)
        scored, ends = np.zeros((BLOCK, total), bool), np.zeros(BLOCK, np.int64)
        for row, (tokens, value) in enumerate(found[:BLOCK]):
            inputs[row, : len(tokens)], ends[row] = tokens, len(tokens)
            targets[row, len(tokens) - 1], scored[row, len(tokens) - 1] = value, True
        return Examples(inputs, targets, scored, np.arange(total) < ends[:, None])

    def shown(self, ids: np.ndarray) -> str:
        return " ".join(("[MIN", "[MAX", "[MED", "[SM", "]")[i - MIN] if i >= MIN else str(i) for i in ids)

    def trivial(self, setting: str) -> dict[str, Predictor]:
        return super().trivial(setting) | {"bag of tokens": linear(self, bag, 5000)}

    def _trees(self, random: np.random.Generator) -> list[tuple[np.ndarray, int]]:
        """Of TRIES trees, tokens and value of those that are kept."""
        owner = np.arange(TRIES)  # the tree of each node of a level
        levels: list[tuple[np.ndarray, np.ndarray]] = []  # by depth: owner, number of children
        sizes = np.zeros(TRIES, np.int64)
        for depth in range(1, self.max_depth + 1):
            operator = (random.random(len(owner)) <= SHARE) & (depth < self.max_depth)
            children = np.where(operator, random.integers(2, self.max_args + 1, len(owner)), 0)
            sizes += np.bincount(owner, 1 + operator, TRIES).astype(np.int64)
            levels.append((owner, children))
            if children.sum() > MOST:  # what these make too long is counted so before memory holds them
                sizes = np.where(sizes + np.bincount(owner, children, TRIES) < self.max_length, sizes, self.max_length)
            fits = sizes[owner] < self.max_length  # of what is too long already, no more is drawn
            owner = np.repeat(owner[fits], children[fits])
            if not len(owner):
                break
        kept = (self.min_length < sizes) & (sizes < self.max_length)
        return _written(levels, kept, random)


def _written(levels: list[tuple[np.ndarray, np.ndarray]], kept: np.ndarray, random: np.random.Generator) -> list[tuple[np.ndarray, int]]:
    """Tokens and values of the trees that are `kept`, from the number of children of each node, level by level."""
    owners = [owner[kept[owner]] for owner, _ in levels]
    children = [count[kept[owner]] for owner, count in levels]
    labels = [np.where(n > 0, random.integers(MIN, SM + 1, len(n)), random.integers(0, 10, len(n))) for n in children]
    sizes, values = [np.zeros(0, np.int64)] * len(levels), [np.zeros(0, np.int64)] * len(levels)
    for depth in reversed(range(len(levels))):
        count, inner = children[depth], children[depth] > 0
        size, value = np.ones(len(count), np.int64), labels[depth].copy()
        if inner.any():
            starts = np.concatenate([[0], np.cumsum(count[inner])[:-1]])
            size[inner] = 2 + np.add.reduceat(sizes[depth + 1], starts)
            value[inner] = _value(labels[depth][inner], values[depth + 1], starts, count[inner])
        sizes[depth], values[depth] = size, value
    trees = owners[0]
    offsets = np.concatenate([[0], np.cumsum(sizes[0])])
    tokens, places = np.zeros(offsets[-1], np.int64), offsets[:-1]
    for depth, count in enumerate(children):
        tokens[places] = labels[depth]
        inner = count > 0
        tokens[places[inner] + sizes[depth][inner] - 1] = CLOSE
        if depth + 1 < len(children):
            below = sizes[depth + 1]
            before = np.cumsum(below) - below  # tokens of the level before each node
            first = np.concatenate([[0], np.cumsum(count[inner])[:-1]]) if inner.any() else np.zeros(0, np.int64)
            places = np.repeat(places[inner] + 1 - before[first], count[inner]) + before
    return [(tokens[offsets[i] : offsets[i + 1]], int(values[0][i])) for i in range(len(trees))]


def _value(operators: np.ndarray, values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What each operator makes of its children's values, which lie one group after the other."""
    group = np.repeat(np.arange(len(counts)), counts)
    ranked = values[np.lexsort((values, group))]
    median = (ranked[starts + (counts - 1) // 2] + ranked[starts + counts // 2]) // 2
    choices = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts), median, np.add.reduceat(values, starts) % 10
    return np.select([operators == op for op in (MIN, MAX, MED, SM)], choices)


TASK = ListOps
