"""What training and evaluating show: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from unisono_tools.voice import Voice

INTERVAL = 10.0  # seconds between plain lines


class Shown:
    """A bar in a terminal, shown while it is entered; None elsewhere, where a line is told now and then."""

    bar: Progress | None = None

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()


class ProgressBar(Shown):
    """Step, loss, tokens/s, time left. `unit` is what a step reads: tokens, positions or frames."""

    def __init__(self, done: int, steps: int, unit: str, console: Console | None = None) -> None:
        self.console = console or Voice(stderr=True)
        self.first, self.done, self.steps, self.unit = done, done, steps, unit
        self.start = self.last = time.monotonic()
        self.read = 0
        if self.console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=steps, completed=done)

    @property
    def rate(self) -> float:
        """Tokens a second since this process began to train."""
        return self.read / max(1e-9, time.monotonic() - self.start)

    def step(self, step: int, loss: float, tokens: int) -> None:
        self.done, self.read = step, self.read + tokens
        text = f"loss {loss:.4f}  {self.rate:,.0f} {self.unit}/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.last >= INTERVAL or step == self.steps:
            self.last = time.monotonic()
            left = (self.steps - step) * (self.last - self.start) / max(1, step - self.first)
            self.say(f"step {step}/{self.steps}  {text}  {left / 60:.1f} min left")

    def evaluating(self, share: float) -> None:
        """How much of an evaluation between two steps is done, 0 to 1."""
        text = f"evaluating {share:.0%}"
        if self.bar:
            self.bar.update(self.task, description=text)
        elif time.monotonic() - self.last >= INTERVAL:
            self.last = time.monotonic()
            self.say(f"step {self.done}/{self.steps}  {text}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Evaluating(Shown):
    """How much of an evaluation by itself is done, called with the share, 0 to 1; a bar is gone once it ends."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Voice(stderr=True)
        self.start = self.last = time.monotonic()
        if self.console.is_terminal:
            columns = (TextColumn("evaluating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=1.0)

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=share)
        elif now - self.last >= INTERVAL and share:
            self.last = now
            left = (now - self.start) * (1 - share) / share
            self.console.print(f"evaluating {share:.0%}  {left / 60:.1f} min left", highlight=False, markup=False, soft_wrap=True)
