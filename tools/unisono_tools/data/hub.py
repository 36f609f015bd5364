"""Sets that live on the Hugging Face hub, under their own names, through the optional package `datasets`."""

from __future__ import annotations

import dataclasses

import numpy as np
from unisono_spec.contract import InputError


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


def documents(name: str, limit: int | None) -> list[tuple[str, np.ndarray]]:
    """The training part of hub set `name`, one document a row, until `limit` bytes are read."""
    entry = SETS[name]
    if entry.streamed and limit is None:
        raise InputError(f"limit: {name} is too large to read whole; give the number of bytes to read, say limit=100000000")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"data: {name!r} needs the package datasets; pip install datasets, or use data=sotu") from error
    try:
        rows = datasets.load_dataset(entry.repository, entry.config, split="train", streaming=True)
        return _read(rows, entry.field, limit)
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"data: {name!r} could not be read from the hub ({reason}); check the network, or use data=sotu") from error


def _read(rows, field: str, limit: int | None) -> list[tuple[str, np.ndarray]]:
    out, size = [], 0
    for number, row in enumerate(rows):
        value = row
        for key in field.split("."):
            value = value[key]
        data = np.frombuffer(value.encode(), np.uint8)
        out.append((f"row {number}", data))
        size += len(data)
        if limit is not None and size >= limit:
            break
    return out
