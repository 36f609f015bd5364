"""Classes of pictures, pixel by pixel (Tay et al. 2021, "Long Range Arena", section 2.2, where they are CIFAR-10's, in grey).

Grey values 0 to 255 are read row by row, and what is asked, at the last of them, is the class. By default the pictures are
Fashion-MNIST's, with a margin of zeros to 32 × 32: no figure of this set stands beside one of CIFAR-10's, which `dataset=cifar10` reads
from the hub.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from unisono_spec.contract import InputError

from unisono_tools.data.labelled import Labelled, open_labelled
from unisono_tools.tasks.base import Examples, OfSet, classified
from unisono_tools.trivial import Predictor, bag, linear, places


@dataclasses.dataclass(frozen=True)
class Image(OfSet):
    """One setting, `images`."""

    dataset: str = "fashion-mnist"
    """Or cifar10, hf:owner/name[:config][:field], or a file that `unisono task image --write FILE` wrote."""
    side: int = 32
    """Pixels of a row and of a column; smaller pictures get a margin of zeros."""

    name = "image"
    source = "arXiv:2011.04006"
    by_class = pictured = True

    def __post_init__(self) -> None:
        if not 1 <= self.side <= 4096:
            raise InputError(f"data.task_options.side: {self.side}; use an integer from 1 to 4096")

    @property
    def vocab_size(self) -> int:
        return 256

    def settings(self, split: str) -> dict[str, float]:
        return {"images": 1.0}

    def length(self, setting: str) -> int:
        return self.side**2

    def size(self, split: str, setting: str) -> int | None:
        return len(self.data.parts[split])

    @property
    def data(self) -> Labelled:
        found = open_labelled(self.dataset)
        if not found.shape:
            raise InputError(f"data.task_options.dataset: {self.dataset} has no pictures; name another, fashion-mnist say")
        if max(found.shape) > self.side:
            size = " × ".join(map(str, found.shape))
            raise InputError(f"data.task_options.side: {self.side}; its pictures have {size} pixels, use {max(found.shape)} or more")
        return found

    def examples(self, split: str, setting: str, numbers: np.ndarray, seed: int = 0) -> Examples:
        found = self.data
        part, (high, wide) = found.parts[split], found.shape
        top, left = (self.side - high) // 2, (self.side - wide) // 2
        inputs = np.zeros((len(numbers), self.side, self.side), np.uint8)
        for image, n in zip(inputs, numbers, strict=True):
            image[top : top + high, left : left + wide] = part[n].reshape(high, wide)
        return classified(inputs.reshape(len(inputs), -1), part.labels[numbers])

    def trivial(self, setting: str) -> dict[str, Predictor]:
        return super().trivial(setting) | {"bag of values": linear(self, bag), "linear in pixels": linear(self, places)}


TASK = Image
