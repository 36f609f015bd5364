"""Files and folders written aside and then put in place: readers see the old or the new, never half of either."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from unisono_spec.contract.errors import InputError, shown

try:
    import fcntl
except ImportError:  # Windows: what a killed writer leaves there stays
    fcntl = None


@contextmanager
def written(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once the block has ended, whole or not at all. Its mode follows the umask."""
    path = _file(path)
    with cannot_be_written(path), aside(path) as draft:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)


def check_writable(path: str | Path) -> None:
    """Raise InputError where `written` would: asked before what takes long, so that its result is not lost."""
    path = _file(path)
    with cannot_be_written(path), aside(path):
        pass


def check_name(path: Path) -> None:
    """Raise InputError where no file can be called so: for a NUL, or half a surrogate pair that stands for no byte."""
    if "\0" in str(path) or any("\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" for c in str(path)):
        raise InputError(f"path: {shown(str(path))} holds what no file's name can; choose another")


def _file(path: str | Path) -> Path:
    """The path of a file, whose folder is there."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path: {shown(path)} has type {type(path).__name__}; give the name of a file")
    path = Path(path)
    check_name(path)
    with cannot_be_written(path):
        if path.is_dir():
            raise InputError(f"{path}: a folder; name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def aside(path: Path, folder: bool = False) -> Iterator[Path]:
    """A hidden file, or folder, beside `path`: gone when the block ends, and where its writer was killed, gone at the next one's start."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: a device, a pipe or a socket, which a file would take the place of; name a file")
    sweep(path)
    draft, handle = _locked(path, folder)
    try:
        yield draft
    finally:
        remove(draft)
        os.close(handle)


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` left beside it."""
    if fcntl is None or not path.parent.is_dir():
        return
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.") and left.name.endswith(".part"):
            with contextlib.suppress(OSError):
                handle = os.open(left, os.O_RDONLY)
                try:
                    # its writer holds a lock for as long as it lives
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(left)
                finally:
                    os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _locked(path: Path, folder: bool) -> tuple[Path, int]:
    while True:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        if folder:
            draft.mkdir()
        handle = os.open(draft, os.O_RDONLY) if folder else os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is None:
            return draft, handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(draft).st_ino == os.fstat(handle).st_ino:
                return draft, handle
        except FileNotFoundError:  # another writer took it for a dead one's between its making and its lock
            pass
        except BlockingIOError:  # and is about to
            pass
        except OSError:  # a filesystem without locks
            return draft, handle
        os.close(handle)


@contextmanager
def cannot_be_written(path: str | Path, remedy: str = "free some space or choose another folder") -> Iterator[None]:
    """Turn the operating system's refusals into InputErrors about `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error
