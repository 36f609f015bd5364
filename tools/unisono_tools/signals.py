"""Signals that end long work between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

# what schedulers send before they kill, and the keyboard
CAUGHT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU") if hasattr(signal, name))


_pressed: list[int] = []  # Ctrl-C, since the command began


def listen() -> None:
    """Remember Ctrl-C from now on, beside raising KeyboardInterrupt: where that comes in a callback of the garbage collector (JAX has one),
    Python drops it."""
    _pressed.clear()
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> None:
    _pressed.append(number)
    raise KeyboardInterrupt


def obey(received: signal.Signals | None) -> None:
    """End this process, as a shell reports one that the signal ended, where it has ended a part of the work; None: go on."""
    if received is not None:
        raise SystemExit(128 + received)


class Stopped(Exception):
    """A signal came while something long was under way that can be left out."""


class Signals:
    """Within it, a first signal is noted in `received` and nothing else; a second one from the keyboard interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        if _pressed:
            self.received = signal.Signals(_pressed.pop())
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
