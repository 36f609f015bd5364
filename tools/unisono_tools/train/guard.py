"""What keeps a run whole: one process in its folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unisono_spec.contract import InputError
from unisono_spec.contract.files import write_bytes

LOCK, OWNER = ".lock", ".lock-owner"


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Hold the run's folder; InputError, which names the holder, where another process does. A killed holder lets go by itself."""
    from filelock import FileLock, Timeout

    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{run}: in use by {_owner(run)}; wait for it, end it, or choose another --out") from error
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error.strerror}); check its permissions or choose another --out") from error
    try:
        write_bytes(run / OWNER, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}".encode())
        yield
    finally:
        (run / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(run: Path) -> str:
    try:
        return (run / OWNER).read_text()
    except (OSError, UnicodeError):
        return "another process"
