"""What long work says while it goes on."""

from __future__ import annotations

from typing import Any

from rich.console import Console


class Voice(Console):
    """A console that falls silent where its reader ends, its terminal closes or its disk is full, as `| head` or a lost connection make it:
    rich would end the process. The work goes on, and its log holds the same."""

    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except OSError:
            self.quiet = True

    def control(self, *control: Any) -> None:
        try:
            super().control(*control)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True
