"""Classes of texts, byte by byte (Tay et al. 2021, "Long Range Arena", section 2.2, where the texts are IMDb's).

The first bytes of a document are read, and what is asked, at the last of them, is its class. By default it is whether the body of a mail
is spam (SpamAssassin's corpus): no figure of this set stands beside one of IMDb's, which `dataset=imdb` reads from the hub.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.memory import check_fits

from unisono_tools.data.labelled import Labelled, open_labelled
from unisono_tools.tasks.base import Examples, OfSet, classified
from unisono_tools.trivial import Predictor, bag, linear


@dataclasses.dataclass(frozen=True)
class Text(OfSet):
    """One setting, `documents`."""

    dataset: str = "spam-assassin"
    """Or imdb, hf:owner/name[:config][:field], or a file that `unisono task text --write FILE` wrote."""
    bytes: int = 4096
    """Of a document that are read, at most."""

    name = "text"
    source = "arXiv:2011.04006"
    by_class = True

    def __post_init__(self) -> None:
        if self.bytes < 1:
            raise InputError(f"data.task_options.bytes: {self.bytes}; use a positive integer")

    @property
    def vocab_size(self) -> int:
        return 256

    def settings(self, split: str) -> dict[str, float]:
        return {"documents": 1.0}

    def length(self, setting: str) -> int:
        return self.bytes

    def size(self, split: str, setting: str) -> int | None:
        return len(self.data.parts[split])

    @property
    def data(self) -> Labelled:
        found = open_labelled(self.dataset)
        if found.shape or not found.classes:
            raise InputError(f"data.task_options.dataset: {self.dataset} has no classes of texts; name another, spam-assassin say")
        return found

    def examples(self, split: str, setting: str, numbers: np.ndarray, seed: int = 0) -> Examples:
        check_fits(32 * len(numbers) * self.bytes, f"data.task_options.bytes: {self.bytes}", "read fewer of a document")
        part = self.data.parts[split]
        texts = [part[n][: self.bytes] for n in numbers]
        inputs = np.zeros((len(texts), self.bytes), np.int64)
        for row, text in zip(inputs, texts, strict=True):
            row[: len(text)] = text
        return classified(inputs, part.labels[numbers], np.array([len(text) for text in texts]))

    def shown(self, ids: np.ndarray) -> str:
        return bytes(ids.astype(np.uint8)).decode("latin-1")

    def trivial(self, setting: str) -> dict[str, Predictor]:
        return super().trivial(setting) | {"bag of bytes": linear(self, bag)}


TASK = Text
