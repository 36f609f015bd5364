"""The run's log: JSON lines, and TensorBoard events made from the same lines, so that the two never disagree."""

from __future__ import annotations

import hashlib
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
from unisono_spec.contract.plain import MAX_BYTES, read_json

NAME = "log.jsonl"


class Log:
    """Rows `{"step": n, "loss": …}` appended to log.jsonl and shown in tensorboard/.

    step: the checkpoint that the run continues from. Later rows are cut away: their steps will be taken again.
    damaged: numbers of the lines that were no rows, and are left out.
    """

    def __init__(self, run: Path, step: int, project: str | None = None, config: dict[str, Any] | None = None) -> None:
        self.path = run / NAME
        self.remote = None if project is None else Remote(run, project, config or {})
        self.damaged: list[int] = []
        rows = [row for row in read(self.path, self.damaged) if row["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        with self._clear_errors():
            self.file = self.path.open("a")
            self.tensorboard = TensorBoard(run / "tensorboard")
            for row in rows:
                self.tensorboard.add(row)

    def add(self, row: dict[str, Any]) -> None:
        with self._clear_errors():
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.tensorboard.add(row)
        if self.remote is not None:
            self.remote.add(row)

    def sync(self) -> None:
        """Make the rows so far as safe as the checkpoint that is about to be written. InputError where their file is gone."""
        if not self.path.is_file() or not os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
            raise InputError(f"{self.path}: removed or moved while the run was writing it; restore the folder, or start anew")
        with self._clear_errors():
            os.fsync(self.file.fileno())
            self.tensorboard.file.flush()

    def close(self) -> None:
        with self._clear_errors():
            self.file.close()
            self.tensorboard.file.close()
        if self.remote is not None:
            self.remote.close()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); free some space or choose another --out") from error


class TensorBoard:
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


class Remote:
    """The same rows in a project of Weights & Biases. A continued run goes on under the same name."""

    def __init__(self, run: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError("wandb_project: the package wandb is not installed here; pip install 'unisono[wandb]'") from error
        name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        try:
            self.run: Any = wandb.init(project=project, id=name, name=run.name, dir=str(run), config=config, resume="allow")
        except Exception as error:  # its client raises errors of its own
            raise InputError(f"wandb_project: {project!r} cannot be logged to ({error}); log in, or set WANDB_MODE=offline") from error

    def add(self, row: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in row.items() if name not in ("step", "time")}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


def read(path: Path, damaged: list[int] | None = None) -> list[dict[str, Any]]:
    """The whole rows of a log. damaged: receives the numbers of lines that are none; the last line may be half-written."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_BYTES):
            number += 1
            row = _row(line)
            if row is not None:
                rows.append(row)
            elif line.endswith(b"\n") and damaged is not None:
                damaged.append(number)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """A step, a time, and numbers; None where a line is not that."""
    try:
        row = read_json(line, "line", "", constants=True) if line.endswith(b"\n") else None
    except InputError:
        return None
    if not isinstance(row, dict) or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in row.values()):
        return None
    return row if isinstance(row.get("step"), int) and "time" in row else None
