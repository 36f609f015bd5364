"""Long work goes on where nobody reads what it says any more."""

from __future__ import annotations

import io

import pytest
from rich.progress import Progress
from unisono_tools.voice import Voice

ERRORS = [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device"), OSError(5, "Input/output error")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("first", range(12))
def test_a_live_bar_whose_terminal_is_lost(monkeypatch, error, first):
    """At whichever of its writes: as it begins, is drawn again, is printed above, or ends."""
    monkeypatch.setenv("TERM", "xterm")
    written = []

    class Lost(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            if len(written) > first:
                raise error
            return len(text)

    console = Voice(file=Lost(), force_terminal=True)
    with Progress(console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=8)
        for done in range(8):
            bar.update(task, completed=done, refresh=True)
        console.print("said above it")
    assert len(written) == first + 1
    assert console.quiet
