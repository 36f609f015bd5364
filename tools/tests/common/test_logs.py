"""Logs: cut back to the checkpoint, and TensorBoard's events equal to the JSON lines."""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from unisono_spec.contract import InputError
from unisono_tools.train.logs import Log, read


def _events(run: Path) -> list[tuple[int, str, float]]:
    """Every scalar in the event files, in order. A record is its length (8 bytes), a checksum (4), the event, a checksum (4)."""
    out = []
    for file in sorted((run / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            out += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return out


def _write(run: Path, steps: range, start: int) -> None:
    log = Log(run, start)
    for step in steps:
        log.add({"step": step, "time": 1.0 * step, "loss": 1 / 2**step})
    log.sync()
    log.close()


def test_rows_after_the_checkpoint_are_cut_away(tmp_path):
    _write(tmp_path, range(1, 8), 0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # what a kill leaves
    _write(tmp_path, range(5, 10), 4)
    assert [row["step"] for row in read(tmp_path / "log.jsonl")] == list(range(1, 10))
    assert _events(tmp_path) == [(step, "loss", 1 / 2**step) for step in range(1, 10)]


DAMAGED = ("nonsense", "[1]", '{"step": 1.5, "time": 0}', '{"time": 0}', '{"step": 2}', '{"step": 2, "time": "now"}', "[" * 20000, "\0", "")


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_costs_itself_alone(tmp_path, line):
    first, last = ('{"step": 1, "time": 0.0, "loss": 1.0}', '{"step": 2, "time": 0.0, "loss": NaN}')
    (tmp_path / "log.jsonl").write_text(f"{first}\n{line}\n{last}\n")
    damaged: list[int] = []
    assert [row["step"] for row in read(tmp_path / "log.jsonl", damaged)] == [1, 2]
    assert damaged == [2]
    log = Log(tmp_path, 2)
    assert log.damaged == [2]
    log.close()
    assert (tmp_path / "log.jsonl").read_text().splitlines() == [first, last]


def test_a_log_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    log = Log(tmp_path, 0)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written"):
        log.sync()
    log.close()


def test_rows_go_to_weights_and_biases_too(tmp_path, monkeypatch):
    module, said = ModuleType("wandb"), []

    class Run:
        def log(self, values: dict, step: int) -> None:
            said.append((step, values))

        def finish(self) -> None:
            said.append("finished")

    module.init = lambda **about: said.append(about) or Run()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        log = Log(tmp_path, 0, "lalm", {"seed": 3})
        log.add({"step": 1, "time": 2.0, "loss": 0.5})
        log.close()
    assert said[1:3] == [(1, {"loss": 0.5}), "finished"]
    assert said[0] == said[3]  # under the same name
    assert (said[0]["project"], said[0]["config"], said[0]["resume"]) == ("lalm", {"seed": 3}, "allow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'unisono\[wandb\]'"):
        Log(tmp_path, 0, "lalm")
