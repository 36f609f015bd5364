"""What keeps a run whole: one process in its folder, and signals that end it between two steps."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from unisono_spec.contract import InputError
from unisono_spec.contract.files import write_bytes

LOCK, OWNER = ".lock", ".lock-owner"
# what schedulers send before they kill, and the keyboard
CAUGHT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name))


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


class Stopped(Exception):
    """A signal came while something long was under way that can be left out."""


class Signals:
    """Within it, a first signal is noted in `received` and nothing else; a second one from the keyboard interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        # Python allows handlers in the main thread only
        main = threading.current_thread() is threading.main_thread()
        # what the parent has had ignored (nohup, a job in the background) stays ignored
        caught = [s for s in CAUGHT if main and signal.getsignal(s) is not signal.SIG_IGN]
        self.before = {s: signal.signal(s, self._note) for s in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def check(self) -> None:
        if self.received is not None:
            raise Stopped
