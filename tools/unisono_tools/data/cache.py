"""Where fetched files, spooled texts and tokenised corpora are kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unisono_spec.contract import InputError
from unisono_spec.contract.files import write_bytes
from unisono_spec.contract.plain import expanded

VARIABLE, MANIFEST = "UNISONO_CACHE", "manifest.json"


def folder(cache: Path | None = None) -> Path:
    """`cache`, or $UNISONO_CACHE, or the user's cache folder. What lies there can be deleted at any time between two runs."""
    given = cache or os.environ.get(VARIABLE)
    if not given:
        import platformdirs

        return platformdirs.user_cache_path("unisono")
    return expanded(given)


def made(place: Path, needs: tuple[str, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the manifest of folder `place` says, which has the names `needs`. Where it is not there, one process makes it, and others wait.

    make: fills the folder → its manifest. A folder whose manifest, or whose files' lengths, are damaged is made anew. One that is whole is
    only read: a cache may be read-only.
    """
    about = _finished(place, needs)
    if about is not None:
        return about
    with locked(place):
        about = _finished(place, needs)
        if about is None:
            try:
                if (place / MANIFEST).exists():
                    shutil.rmtree(place)  # who has mapped its files keeps them
                place.mkdir(parents=True, exist_ok=True)
                about = make()
                lengths = {file.name: file.stat().st_size for file in place.iterdir() if file.is_file()}
                write_bytes(place / MANIFEST, json.dumps(about | {"lengths": lengths}).encode())
            except OSError as error:
                raise InputError(f"{place}: cannot be written ({error.strerror}); free some space or set ${VARIABLE}") from error
    return about


def _finished(place: Path, needs: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        about = json.loads((place / MANIFEST).read_bytes())
        whole = all((place / name).stat().st_size == size for name, size in about.get("lengths", {}).items())
        return about if whole and all(name in about for name in needs) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


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
