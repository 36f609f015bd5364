"""Signals that end long work between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

# what schedulers send before they kill, and the keyboard
CAUGHT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name))


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
