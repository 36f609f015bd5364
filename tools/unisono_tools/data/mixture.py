"""Several corpora in one run, each with its share of the sequences."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.initial import generator

from unisono_tools.data.corpus import Corpus
from unisono_tools.data.tokenizers import Tokenizer

BLOCK = 1 << 16  # sequences whose corpora are drawn at once


@dataclasses.dataclass(frozen=True)
class Mixture:
    """corpora: of one tokenizer. shares: of the sequences, positive; only their ratios count."""

    corpora: tuple[Corpus, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, corpus: Corpus | Mixture) -> Mixture:
        return corpus if isinstance(corpus, Mixture) else cls((corpus,), (1.0,))

    def __post_init__(self) -> None:
        first = self.corpora[0]
        for other in self.corpora[1:]:
            if (other.tokenizer is None) != (first.tokenizer is None) or other.train.shape[1:] != first.train.shape[1:]:
                raise InputError(f"data.mixture: {other.name} and {first.name} are not of one kind; mix texts, or frames of one width")

    @property
    def weights(self) -> np.ndarray:
        """The shares, which sum to 1."""
        shares = np.array(self.shares, np.float64)
        return shares / shares.sum()

    @property
    def name(self) -> str:
        return " + ".join(corpus.name for corpus in self.corpora)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.corpora[0].tokenizer

    @property
    def digest(self) -> str:
        """Of all that is read; of one corpus, its own."""
        if len(self.corpora) == 1:
            return self.corpora[0].digest
        return hashlib.sha256(" ".join(corpus.digest for corpus in self.corpora).encode()).hexdigest()

    def drawn(self, seed: int, first: int, number: int) -> np.ndarray:
        """From which corpus the sequences first … first + number − 1 of a run are, [number] int64: drawn with the seed."""
        if len(self.corpora) == 1:
            return np.zeros(number, np.int64)
        blocks = range(first // BLOCK, (first + number - 1) // BLOCK + 1)
        found = np.concatenate([_block(self.weights.tobytes(), seed, block) for block in blocks])
        return found[first - blocks[0] * BLOCK :][:number].astype(np.int64)

    def before(self, seed: int, first: int) -> np.ndarray:
        """How many of the sequences 0 … first − 1 of a run each corpus gave, [corpora] int64."""
        count = len(self.corpora)
        if count == 1:
            return np.array([first], np.int64)
        whole, rest = divmod(first, BLOCK)
        found = _counts(self.weights.tobytes(), seed, whole)
        return found + np.bincount(_block(self.weights.tobytes(), seed, whole)[:rest], minlength=count)

    def lanes(self, number: int) -> np.ndarray:
        """How many of `number` streams each corpus has, [corpora] int64: its share, rounded so that all are given away."""
        exact = self.weights * number
        found = np.floor(exact).astype(np.int64)
        found[np.argsort(found - exact, kind="stable")[: number - found.sum()]] += 1
        if not found.all():
            name = self.corpora[int(found.argmin())].name
            raise InputError(f"data.mixture: {name} has less than one of {number} streams; raise batch_size or its share")
        return found


@functools.lru_cache(maxsize=4)
def _block(weights: bytes, seed: int, block: int) -> np.ndarray:
    edges = np.cumsum(np.frombuffer(weights))[:-1]
    return np.searchsorted(edges, generator(seed, f"mixture.{block}").random(BLOCK), side="right").astype(np.uint16)


@functools.lru_cache(maxsize=4)
def _counts(weights: bytes, seed: int, blocks: int) -> np.ndarray:
    """What the first `blocks` blocks hold of each corpus."""
    count = len(weights) // 8
    block = _block.__wrapped__  # what is counted once is not kept
    return sum((np.bincount(block(weights, seed, b), minlength=count) for b in range(blocks)), np.zeros(count, np.int64))


def streams(lengths: Sequence[int], lanes: np.ndarray, names: Sequence[str], seq_len: int) -> list[int]:
    """How many windows each stream of each corpus of `lengths` ids has."""
    found = [(length - 1) // int(n) // seq_len for length, n in zip(lengths, lanes, strict=True)]
    for windows, length, n, name in zip(found, lengths, lanes, names, strict=True):
        if not windows:
            raise InputError(f"{name}: {length} ids are too few for {n} streams of {seq_len} tokens; lower batch_size or seq_len")
    return found
