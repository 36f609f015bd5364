"""What long work says while it goes on."""

from __future__ import annotations

from typing import Any

from rich.console import Console


class Voice(Console):
    """A console that falls silent where its reader ends, its terminal closes or its disk is full, as `| head` or a lost connection make it:
    rich would end the process. The work goes on, and its log holds the same."""

    def __exit__(self, *raised: Any) -> None:  # where rich writes: at the end of a print, and of what a live bar draws
        try:
            super().__exit__(*raised)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True
