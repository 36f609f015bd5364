"""Functions of the spec replaced for a while: by planted mistakes, and where realisations err inside an op."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

Patch = tuple[Any, str, Any]  # object, attribute, what stands there instead


@contextlib.contextmanager
def patched(patches: tuple[Patch, ...]) -> Iterator[None]:
    kept = [(where, name, getattr(where, name)) for where, name, _ in patches]
    try:
        for where, name, instead in patches:
            setattr(where, name, instead)
        yield
    finally:
        for where, name, original in kept:
            setattr(where, name, original)
