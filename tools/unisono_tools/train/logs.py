"""The run's log: JSON lines, and TensorBoard events made from the same lines, so that the two never disagree."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
        self.path = run / NAME
        rows = [row for row in read(self.path) if row["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        with self._clear_errors():
            self.file = self.path.open("a")
            self.board = Board(run / "tensorboard")
            for row in rows:
                self.board.add(row)

    def add(self, row: dict[str, Any]) -> None:
        with self._clear_errors():
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.board.add(row)

    def sync(self) -> None:
        """Make the rows so far as safe as the checkpoint that is about to be written."""
        with self._clear_errors():
            os.fsync(self.file.fileno())
            self.board.file.flush()

    def close(self) -> None:
        with self._clear_errors():
            self.file.close()
            self.board.file.close()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); free some space or choose another --out") from error


class Board:
    """A TensorBoard event file. SummaryWriter would write it from a thread, where a full disk is nobody's error."""

    def __init__(self, folder: Path) -> None:
        # tensorboardX imports torch where that is installed, which only training should pay for
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.record_writer import RecordWriter

        self.event, self.summary = Event, Summary
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.file = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.unisono"))
        self.file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def add(self, row: dict[str, Any]) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in row.items() if name not in ("step", "time")]
        event = self.event(wall_time=row["time"], step=row["step"], summary=self.summary(value=values))
        self.file.write(event.SerializeToString())


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
