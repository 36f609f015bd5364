"""Sets that live on the Hugging Face hub, through the optional package `datasets`: some by their own names, any as hf:owner/name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unisono_spec.contract import InputError

PREFIX = "hf:"
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class HubSet:
    repository: str
    config: str | None
    field: str
    streamed: bool = False  # too large to read whole


SETS = {
    "wikitext-103-raw-v1": HubSet("Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
    "c4": HubSet("allenai/c4", "en", "text", streamed=True),
    "pile": HubSet("monology/pile-uncopyrighted", None, "text", streamed=True),
    "narrativeqa": HubSet("deepmind/narrativeqa", None, "document.text", streamed=True),
    "imdb": HubSet("stanfordnlp/imdb", "plain_text", "text"),
}
PICTURES = {"cifar10": HubSet("uoft-cs/cifar10", "plain_text", "img")}


def spec(name: str, field: str = "text") -> HubSet:
    """What `name` means: one of SETS or PICTURES, or hf:owner/name[:config][:field].

    A local folder of the hub's layout may stand in the place of owner/name.
    """
    if name in SETS or name in PICTURES:
        return SETS.get(name) or PICTURES[name]
    repository, *more = name.removeprefix(PREFIX).split(":")
    if not repository or len(more) > 2:
        raise InputError(f"data: {name!r}; write {PREFIX}owner/name, {PREFIX}owner/name:config or {PREFIX}owner/name:config:field")
    return HubSet(repository, (more[0] or None) if more else None, more[1] if len(more) > 1 else field)


def rows(name: str, entry: HubSet, limit: int | None) -> Iterator[tuple[int, bytes]]:
    """(split, text of one row); the set's own splits where it has them, which share `limit` as 90 %, 5 % and 5 %."""
    from unisono_tools.data.sources import text_of

    if entry.streamed and limit is None:
        raise InputError(f"limit: {name} is too large to read whole; give the number of bytes to read, say limit=100000000")
    with _reached(name):
        splits = _splits(name, entry)
        single = not any(split in splits for split in SPLITS[1:])
        for number, split in enumerate(SPLITS):
            left = math.inf if limit is None else limit if single else math.ceil(limit * (0.9, 0.05, 0.05)[number])
            for i, row in enumerate(splits.get(split, ())):
                text = text_of(row, entry.field, f"{name}: {split}, row {i}")
                text = text if len(text) <= left else text[: int(left)].decode(errors="ignore").encode()
                yield number, text
                left -= len(text)
                if left < 4:  # less than a character
                    break


def examples(name: str, entry: HubSet) -> Iterator[tuple[str, Any, int]]:
    """(split, what `entry.field` holds, class) of each row that has a class; the field `label` holds it."""
    with _reached(name):
        for split, found in _splits(name, entry).items():
            if split not in SPLITS:  # "unsupervised"
                continue
            for i, row in enumerate(found):
                if entry.field not in row or not isinstance(row.get("label"), int) or not 0 <= row["label"] < 256:
                    missing = entry.field if entry.field not in row else "label"
                    raise InputError(f"{name}: {split}, row {i} has no {missing!r} to classify by; name another set or field")
                yield split, row[entry.field], row["label"]


def _splits(name: str, entry: HubSet) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"data: {name!r} needs the package datasets; pip install 'unisono[data]', or use data=sotu") from error
    found: Any = datasets.load_dataset(entry.repository, entry.config, streaming=True)
    return found if hasattr(found, "keys") else {"train": found}


@contextmanager
def _reached(name: str) -> Iterator[None]:
    """The hub's client raises errors of many libraries; each becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"data: {name!r} could not be read from the hub ({reason}); check the network, or use data=sotu") from error
