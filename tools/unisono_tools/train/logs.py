"""The run's log: JSON lines, and TensorBoard events made from the same lines, so that the two never disagree."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from unisono_spec.contract import InputError
from unisono_spec.contract.files import write_bytes

NAME = "log.jsonl"


class Log:
    """Rows `{"step": n, "loss": …}` appended to log.jsonl and shown in tensorboard/.

    step: the checkpoint that the run continues from. Later rows are cut away: their steps will be taken again.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.path, events = run / NAME, run / "tensorboard"
        from tensorboardX import SummaryWriter  # it imports torch where that is installed, which only training should pay for

        rows = [row for row in read(self.path) if row["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        try:
            shutil.rmtree(events, ignore_errors=True)
            self.file = self.path.open("a")
            self.board = SummaryWriter(str(events))
        except OSError as error:
            raise self._unwritable(error) from error
        for row in rows:
            self._show(row)

    def add(self, row: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self._show(row)
        except OSError as error:
            raise self._unwritable(error) from error

    def sync(self) -> None:
        """Make the rows so far as safe as the checkpoint that is about to be written."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        self.file.close()
        self.board.close()

    def _show(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "time"):
                self.board.add_scalar(name, value, row["step"], walltime=row["time"])

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written ({error.strerror}); free some space or choose another --out")


def read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a log; the last line may be half-written."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows
