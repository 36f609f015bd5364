"""Whether two texts belong together, byte by byte (Tay et al. 2021, "Long Range Arena", section 2.2).

There, papers of a citation network, each read by itself; here one sequence: a text, a mark, another text, and what is asked at the last
byte is whether both are of one document (class 1) or of two, a fair coin. By default texts are passages of State of the Union
addresses, those of training, validation and test from different addresses; of a set with classes, texts of one class belong together. No
figure stands beside one of the citation network's.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from unisono_spec.contract import InputError

from unisono_tools.data.labelled import Labelled, open_labelled
from unisono_tools.tasks.base import Drawn, Examples, OfSet, classified
from unisono_tools.trivial import Predictor, linear

MARK = 256  # between the texts


@dataclasses.dataclass(frozen=True)
class Retrieval(OfSet, Drawn):
    """One setting, `pairs`."""

    dataset: str = "sotu"
    """Or spam-assassin, imdb, hf:owner/name[:config][:field], or a file that `unisono task text --write FILE` wrote."""
    bytes: int = 4000
    """Of each text, at most."""

    name = "retrieval"
    source = "arXiv:2011.04006"
    by_class = True

    def __post_init__(self) -> None:
        if self.bytes < 1:
            raise InputError(f"data.task_options.bytes: {self.bytes}; use a positive integer")

    @property
    def vocab_size(self) -> int:
        return 257

    def settings(self, split: str) -> dict[str, float]:
        return {"pairs": 1.0}

    def length(self, setting: str) -> int:
        return 2 * self.bytes + 1

    @property
    def data(self) -> Labelled:
        found = open_labelled(self.dataset)
        if found.shape:
            raise InputError(f"data.task_options.dataset: {self.dataset} has pictures; name a set of texts, sotu say")
        return found

    def block(self, setting: str, random: np.random.Generator, split: str) -> Examples:
        texts, owners = _texts(self.data.digest, self.dataset, split, self.bytes)
        order = np.argsort(owners, kind="stable")
        inputs = np.zeros((self.block_size, self.length(setting)), np.int64)
        labels, ends = random.integers(0, 2, self.block_size), np.zeros(self.block_size, np.int64)
        for row, label in enumerate(labels):
            first = int(random.integers(len(texts)))
            mates, strangers = order[owners[order] == owners[first]], order[owners[order] != owners[first]]
            second = int(random.choice(mates[mates != first] if label else strangers))
            read = [*texts[first], MARK, *texts[second]]
            inputs[row, : len(read)], ends[row] = read, len(read)
        return classified(inputs, labels, ends)

    def shown(self, ids: np.ndarray) -> str:
        return "".join("⏎⏎" if i == MARK else chr(i) for i in ids)

    def trivial(self, setting: str) -> dict[str, Predictor]:
        return super().trivial(setting) | {"bags of bytes": linear(self, _apart, 2000)}


@functools.lru_cache(maxsize=8)
def _texts(digest: str, dataset: str, split: str, length: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Texts of a split, and whose each is: whole passages of documents, or the beginnings of documents with classes."""
    found = open_labelled(dataset)
    part, texts, owners = found.parts[split], [], []
    for i in range(len(part)):
        document = part[i]
        starts = [0] if found.classes else range(0, len(document) - length + 1, length)
        texts += [document[s : s + length] for s in starts]
        owners += [int(part.labels[i])] * len(starts)
    numbers = np.bincount(owners) if owners else np.zeros(1, int)
    alone = {owner for owner, number in enumerate(numbers) if number == 1}  # of which no pair can be
    kept = [i for i, owner in enumerate(owners) if owner not in alone]
    if len({owners[i] for i in kept}) < 2:
        raise InputError(f"data.task_options.bytes: {length}; {split} of {dataset} has no two documents of twice that, use fewer")
    return [texts[i] for i in kept], np.array([owners[i] for i in kept])


def _apart(examples: Examples) -> np.ndarray:
    """By how much the shares of each byte differ between the two texts."""
    out = []
    assert examples.valid is not None
    for row, valid in zip(examples.inputs, examples.valid, strict=True):
        read = row[valid]
        mark = int(np.flatnonzero(read == MARK)[0])
        one, other = (np.bincount(text, minlength=256) / len(text) for text in (read[:mark], read[mark + 1 :]))
        out.append(np.abs(np.sqrt(one) - np.sqrt(other)))
    return np.array(out)


TASK = Retrieval
