"""The next base of a genome, read base by base.

Windows of a sequence; what is asked at each place is the base that follows, in bits a base: 2 without any knowledge. By default the
sequence is human chromosome 20 (GRCh37), of which 50 to 55 million bases are held out, the first half to validate, the second to test. Its
figures stand beside no perplexity of a whole genome.
"""

from __future__ import annotations

import dataclasses
import functools
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.files import write_bytes
from unisono_spec.contract.initial import generator
from unisono_spec.contract.memory import check_fits

from unisono_tools.data.cache import folder
from unisono_tools.data.sources import open_source
from unisono_tools.tasks.base import Examples, Task, once
from unisono_tools.trivial import Predictor

A, C, G, T, OTHER = range(5)
LETTERS = "ACGTN"  # N: any base that is not known
KNOWN = 0.5  # share of a window that is known, at least
ORDERS = (0, 4, 8, 11)  # of the counts that stand as baselines, where there are as many bases as runs
PIECE = 1 << 22  # bases counted at once


@dataclasses.dataclass(frozen=True)
class DNA(Task):
    """Settings are lengths."""

    dataset: str = "human-chr20"
    """Or ecoli, or a FASTA file, also compressed."""
    train: tuple[int, ...] = (1024,)
    """Bases of a window in training."""
    test: tuple[int, ...] = (1024, 4096, 16384, 65536)
    held_out: tuple[int, int] = (50_000_000, 55_000_000)
    """From where to where; a sequence that ends before holds out its last tenth."""

    name = "dna"
    source = "doi:10.1038/35057062"
    metric = None

    def __post_init__(self) -> None:
        for field in ("train", "test"):
            if min(getattr(self, field), default=0) < 1:
                raise InputError(f"data.task_options.{field}: {list(getattr(self, field))}; give positive lengths")
            once(getattr(self, field), field)
        if len(self.held_out) != 2 or not 0 < self.held_out[0] < self.held_out[1]:
            raise InputError(f"data.task_options.held_out: {list(self.held_out)}; give two numbers of bases, the smaller first")

    @property
    def vocab_size(self) -> int:
        return len(LETTERS)

    def settings(self, split: str) -> dict[str, float]:
        lengths = self.test if split == "test" else self.train
        return {str(n): 1 / len(lengths) for n in lengths}

    def length(self, setting: str) -> int:
        return int(setting)

    def size(self, split: str, setting: str) -> int | None:
        return None if split == "train" else len(self._starts(split, int(setting)))

    @property
    def content(self) -> str:
        return _sequence(self.dataset, folder())[1]

    @property
    def bases(self) -> np.ndarray:
        """The whole sequence, ids uint8."""
        return _sequence(self.dataset, folder())[0]

    def examples(self, split: str, setting: str, numbers: np.ndarray, seed: int = 0) -> Examples:
        length = int(setting)
        starts = [self._drawn(length, seed, int(n)) for n in numbers] if split == "train" else self._starts(split, length)[numbers]
        windows = np.stack([self.bases[s : s + length + 1] for s in starts]).astype(np.int64)
        return Examples(windows[:, :-1], windows[:, 1:], windows[:, 1:] != OTHER)

    def regions(self, split: str) -> list[tuple[int, int]]:
        """From where to where a split goes."""
        total = len(self.bases)
        start, end = self.held_out if self.held_out[1] <= total else (total - total // 10, total)
        middle = (start + end) // 2
        return {"train": [(0, start), (end, total)], "validation": [(start, middle)], "test": [(middle, end)]}[split]

    def _drawn(self, length: int, seed: int, number: int) -> int:
        """Where a training window starts: anywhere, but where most of it is unknown."""
        random = generator(seed, f"dna.{length}.{number}")
        rooms = [(a, b - a - length) for a, b in self.regions("train") if b - a > length]
        if not rooms:
            raise InputError(f"data.task_options.train: {length} bases; the longest stretch has fewer, give smaller lengths")
        sizes = np.array([room for _, room in rooms])
        for _ in range(10_000):
            place = int(random.integers(sizes.sum()))
            region = int(np.searchsorted(np.cumsum(sizes), place, "right"))
            start = rooms[region][0] + place - int(sizes[:region].sum())
            if (self.bases[start : start + length] != OTHER).mean() >= KNOWN:
                return start
        raise InputError(f"data.task_options.dataset: {self.dataset} has hardly any known bases; name another")

    def _starts(self, split: str, length: int) -> np.ndarray:
        """Of windows side by side."""
        ((start, end),) = self.regions(split)
        found = _windows(self.dataset, start, end, length, folder())
        if not len(found):
            raise InputError(f"data.task_options: no window of {length} bases in the {end - start:,} of {split}; give smaller lengths")
        return found

    def shown(self, ids: np.ndarray) -> str:
        return "".join(LETTERS[i] for i in ids)

    def trivial(self, setting: str) -> dict[str, Predictor]:
        return {}

    def baselines(self, split: str = "test", number: int = 1000) -> dict[str, dict[str, float]]:
        """Bits a base of order-k counts over the training part, each begun at one; fewer bases are looked at where a window begins."""
        tables = {k: _counts(self.bases, self.regions("train"), k) for k in ORDERS if 4**k <= len(self.bases)}
        totals, out = {k: table.sum(1) for k, table in tables.items()}, {}
        for setting in self.settings(split):
            bits, places = dict.fromkeys(tables, 0.0), 0
            for n in range(min(number, self.size(split, setting) or number)):
                found = self.examples(split, setting, np.array([n]))
                window = np.append(found.inputs[0], found.targets[0, -1])
                scored, lower = found.scored[0], np.full(len(window) - 1, np.nan)
                places += int(scored.sum())
                for k, table in tables.items():  # a place without k known bases before it takes what the order below says
                    codes, ends = _codes(window, k)
                    lower[ends - 1] = np.log2((table.ravel()[codes] + 1) / (totals[k][codes // 4] + 4))
                    bits[k] -= float(lower[scored].sum())
            out[setting] = {f"counts of order {k}": bits[k] / places for k in tables}
        return out

    def write(self, path: Path, number: int) -> None:
        """As FASTA; `number` bases, or all."""
        text = np.frombuffer(LETTERS.encode(), np.uint8)[self.bases[: number or None]].tobytes()
        data = f">{self.dataset}\n".encode() + b"\n".join(text[i : i + 60] for i in range(0, len(text), 60)) + b"\n"
        write_bytes(path, lzma.compress(data, preset=6) if path.suffix == ".xz" else data)


@functools.lru_cache(maxsize=2)
def _sequence(dataset: str, cache: Path) -> tuple[np.ndarray, str]:
    """Ids of all its records, one behind the other, and their digest."""
    source = open_source(dataset, cache=cache)
    if source.unit != "base":
        raise InputError(
            f"data.task_options.dataset: {dataset} is no FASTA; name human-chr20, ecoli or a file whose name ends in .fa or .fna"
        )
    check_fits(2 * int(source.sizes.sum()), f"data.task_options.dataset: {dataset}", "name a shorter sequence")
    ids = np.full(256, OTHER, np.uint8)
    ids[np.frombuffer(b"ACGT", np.uint8)] = range(4)
    pieces: Iterator[bytes] = (piece for i, size in enumerate(source.sizes) for piece in source.read(i, 0, int(size)))
    return np.concatenate([ids[np.frombuffer(piece, np.uint8)] for piece in pieces]), source.digest


@functools.lru_cache(maxsize=16)
def _windows(dataset: str, start: int, end: int, length: int, cache: Path) -> np.ndarray:
    """Where windows side by side start, but for those that are mostly unknown."""
    bases, _ = _sequence(dataset, cache)
    return np.array([s for s in range(start, end - length, length) if (bases[s : s + length] != OTHER).mean() >= KNOWN], np.int64)


def _codes(bases: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the runs of order + 1 known bases, and the place of each run's last base."""
    runs = np.lib.stride_tricks.sliding_window_view(bases, order + 1)
    codes, known = np.zeros(len(runs), np.int64), np.ones(len(runs), bool)
    for column in range(order + 1):
        codes = 4 * codes + runs[:, column]
        known &= runs[:, column] != OTHER
    ends = np.flatnonzero(known) + order
    return codes[known], ends


def _counts(bases: np.ndarray, regions: list[tuple[int, int]], order: int) -> np.ndarray:
    """How often each base follows each run of `order`: [4^order, 4]."""
    counts = np.zeros(4 ** (order + 1), np.int64)
    for start, end in regions:
        for first in range(start, end - order, PIECE):
            counts += np.bincount(_codes(bases[first : min(end, first + PIECE + order)], order)[0], minlength=len(counts))
    return counts.reshape(-1, 4)


TASK = DNA
