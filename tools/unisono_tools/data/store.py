"""Tokenised corpora: made once, in constant memory, into a folder named by the hash of all that they depend on.

train.ids, validation.ids, test.ids     little-endian ids, one after the other
train.documents, …                      where each document starts, int64
manifest.json                           dtype, bytes of each split, the files' lengths; written last: without it the folder is unfinished
progress.json                           how far an unfinished one has come: it is continued from there
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract.files import write_bytes

from unisono_tools.data.cache import folder, made
from unisono_tools.data.sources import Source
from unisono_tools.data.tokenizers import Tokenizer, identity

SPLITS: tuple[str, ...] = ("train", "validation", "test")
PROGRESS = "progress.json"
VERSION = 1
EVERY = 1 << 25  # bytes of text between two records of progress
PATIENCE = 5.0  # seconds before progress is shown


@dataclasses.dataclass(frozen=True)
class Segment:
    """Bytes start … stop of one document."""

    source: Source
    document: int
    start: int
    stop: int

    @property
    def label(self) -> str:
        inner = self.source.label(self.document)
        return f"{self.source.name}: {inner}" if inner else self.source.name

    def pieces(self, skip: int = 0) -> Iterator[bytes]:
        return self.source.read(self.document, self.start + skip, self.stop)


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """By split: ids [N], starts of documents [number], bytes of text."""

    ids: dict[str, np.ndarray]
    documents: dict[str, np.ndarray]
    sizes: dict[str, int]
    digest: str


def tokenised(segments: dict[str, list[Segment]], tokenizer: Tokenizer, cache: Path | None = None) -> Tokenised:
    """The ids of each split's segments, from the cache or else made now."""
    digest = _digest(segments, tokenizer)
    place = folder(cache) / "tokens" / digest[:32]
    about = made(place, ("dtype", "sizes"), lambda: _Writer(place, segments, tokenizer).run())
    dtype = np.dtype(about["dtype"])
    ids = {split: _map(place / f"{split}.ids", dtype) for split in SPLITS}
    documents = {split: np.fromfile(place / f"{split}.documents", "<i8").astype(np.int64) for split in SPLITS}
    return Tokenised(ids, documents, about["sizes"], digest)


def _digest(segments: dict[str, list[Segment]], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{VERSION} {identity(tokenizer)}".encode())
    for split in SPLITS:
        digest.update(f"{split} {sorted({s.source.digest for s in segments[split]})}".encode())
        digest.update(np.array([(s.document, s.start, s.stop) for s in segments[split]], "<i8").tobytes())
    return digest.hexdigest()


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


class _Writer:
    def __init__(self, place: Path, segments: dict[str, list[Segment]], tokenizer: Tokenizer) -> None:
        self.place, self.segments, self.tokenizer = place, segments, tokenizer
        size = tokenizer.vocab_size
        self.dtype = np.dtype("u1" if size <= 1 << 8 else "<u2" if size <= 1 << 16 else "<u4")
        self.total = sum(s.stop - s.start for split in SPLITS for s in segments[split])
        self.read = self.kept = 0
        self.begun = self.said = time.monotonic()

    def run(self) -> dict[str, Any]:
        """The manifest."""
        done = self._progress()
        for split in SPLITS:
            self._split(split, done)
        (self.place / PROGRESS).unlink(missing_ok=True)
        return {"dtype": self.dtype.str, "sizes": {split: sum(s.stop - s.start for s in self.segments[split]) for split in SPLITS}}

    def _progress(self) -> dict[str, Any]:
        """What an earlier process recorded; nothing where that, or what it wrote, is damaged."""
        try:
            done = json.loads((self.place / PROGRESS).read_text())
            split, numbers = done["split"], {name: int(done[name]) for name in ("segment", "bytes", "context", "ids", "documents")}
            lengths = {f"{split}.ids": numbers["ids"] * self.dtype.itemsize, f"{split}.documents": numbers["documents"] * 8}
            whole = split in SPLITS and all((self.place / name).stat().st_size >= length for name, length in lengths.items())
            whole = whole and done["before"] == self._before(split)
            return {"split": split, **numbers} if whole else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def _before(self, split: str) -> dict[str, int]:
        """The files' lengths of the splits before it, which are finished."""
        names = [f"{each}.{part}" for each in SPLITS[: SPLITS.index(split)] for part in ("ids", "documents")]
        return {name: (self.place / name).stat().st_size for name in names}

    def _split(self, split: str, done: dict[str, Any]) -> None:
        """done: what an earlier process recorded: its split, segment, bytes and context in it, ids and documents written."""
        order = SPLITS.index(split) - SPLITS.index(done.get("split", SPLITS[0]))
        segments = self.segments[split]
        if order < 0:
            self.read += sum(s.stop - s.start for s in segments)
            return
        here = done if done and order == 0 else {"segment": 0, "bytes": 0, "context": 0, "ids": 0, "documents": 0}
        written, documents = here["ids"], here["documents"]
        self.read += sum(s.stop - s.start for s in segments[: here["segment"]]) + here["bytes"]
        self.kept = self.read
        with _continued(self.place / f"{split}.ids", written * self.dtype.itemsize) as ids, \
                _continued(self.place / f"{split}.documents", documents * 8) as starts:  # fmt: skip
            for number in range(here["segment"], len(segments)):
                segment, skip, context, begun = segments[number], 0, 0, False
                if number == here["segment"] and here["bytes"]:
                    skip, context, begun = here["bytes"] - here["context"], here["context"], True
                before = skip + context
                pieces = segment.pieces(skip)
                for encoded in self.tokenizer.encode_stream(pieces, segment.label, segment.start + skip, context):
                    if not begun and len(encoded.ids):
                        starts.write(np.array([written], "<i8").tobytes())
                        documents, begun = documents + 1, True
                    ids.write(encoded.ids.astype(self.dtype).tobytes())
                    written += len(encoded.ids)
                    self.read += skip + encoded.done - before
                    before = skip + encoded.done
                    if self.read - self.kept >= EVERY:
                        for file in (ids, starts):
                            file.flush()
                            os.fsync(file.fileno())
                        record = {"split": split, "segment": number, "bytes": before, "context": encoded.context}
                        self._record(record | {"ids": written, "documents": documents})
                    self._show()

    def _record(self, values: dict[str, Any]) -> None:
        write_bytes(self.place / PROGRESS, json.dumps(values | {"before": self._before(values["split"])}).encode())
        self.kept = self.read

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.said >= PATIENCE:
            self.said = now
            rate = self.read / (now - self.begun)
            text = f"tokenizing: {self.read / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {(self.total - self.read) / rate / 60:.1f} min left"
            from unisono_tools.voice import Voice

            Voice(stderr=True).print(text, highlight=False)


def _continued(path: Path, size: int) -> Any:
    """A file to append to, cut to what was recorded."""
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file
