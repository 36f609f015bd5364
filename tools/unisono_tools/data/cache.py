"""Where fetched files, spooled texts and tokenised corpora are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unisono_spec.contract import InputError

VARIABLE = "UNISONO_CACHE"


def folder(cache: Path | None = None) -> Path:
    """`cache`, or $UNISONO_CACHE, or the user's cache folder. What lies there can be deleted at any time between two runs."""
    given = cache or os.environ.get(VARIABLE)
    if not given:
        import platformdirs

        return platformdirs.user_cache_path("unisono")
    return Path(given)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes what lies at `path`; the others wait, and find it made."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(path.name + ".lock"))
        lock.acquire()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another folder in ${VARIABLE}") from error
    try:
        yield
    finally:
        lock.release()
