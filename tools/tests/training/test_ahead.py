"""Examples that other processes draw ahead are those that the run itself would draw."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from unisono_spec.contract import InputError
from unisono_tools.config import DataChoice, ModelChoice
from unisono_tools.train.task_datamodule import TaskDataModule

# of two lengths; in an order of epochs, and some end early
TASKS = (
    DataChoice(task="mqar", task_options={"vocabulary": 16, "train": ["16x2", "8x1"], "shares": [1, 1], "test": ["24x2"]}),
    DataChoice(task="listops", task_options={"max_depth": 3, "max_args": 3, "min_length": 3, "max_length": 12}),
)


def _module(tiny, data, workers):
    train = tiny(batch_size=4, seed=3, data=dataclasses.replace(data, workers=workers), model=ModelChoice("cram-1m", {"vocab_size": 16}))
    return TaskDataModule(train, train.validate())


@pytest.mark.parametrize("data", TASKS, ids=lambda data: data.task)
def test_examples_are_the_same_whatever_the_number_of_processes(tiny, data):
    alone = _module(tiny, data, 0)
    for workers, steps in ((1, (0, 1)), (2, (5, 6, 7, 3, 4))):  # from a middle, as a run that goes on; and back
        module = _module(tiny, data, workers)
        assert module.ahead is not None
        for step in steps:
            mine, its = module.batch(step), alone.batch(step)
            for name in ("inputs", "targets", "scored", "valid"):
                one, other = getattr(mine, name), getattr(its, name)
                assert (one is None) == (other is None)
                assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))


def test_processes_leave_signals_to_the_run_and_end_with_it(tiny):
    module = _module(tiny, TASKS[0], 1)
    module.batch(0)
    assert module.ahead is not None
    (process,) = module.ahead.processes
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    for step in (1, 2):
        module.batch(step)
    assert process.poll() is None
    del module
    assert process.poll() is not None


def test_a_process_that_ended_is_told(tiny):
    """And the others end with the run, although what it was asked last stands in its pipe."""
    module = _module(tiny, TASKS[0], 2)
    assert module.ahead is not None
    ahead, processes = module.ahead, module.ahead.processes
    processes[0].kill()
    processes[0].wait()
    with pytest.raises(InputError, match=r"data\.workers: a process that draws examples ended with status -9; use fewer, or 0"):
        module.batch(0)
    ahead.end()
    assert [process.poll() for process in processes] == [-9, -9]


def test_what_a_process_cannot_draw_is_one_line():
    command = [sys.executable, "-m", "unisono_tools.ahead"]
    found = subprocess.run(command, input='{"name": "mqr", "options": {}}\n', capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert re.fullmatch(r"data\.task: 'mqr' is unknown; .*mqar.*\n", found.stderr)


def test_as_many_processes_as_make_sense(tiny):
    with pytest.raises(InputError, match=r"data\.workers: 65 is not valid, use 0 to 64 processes"):
        tiny(data=dataclasses.replace(TASKS[0], workers=65)).validate()
    with pytest.raises(InputError, match=r"data\.workers: given without data\.task; name the task"):
        tiny(data=DataChoice(workers=2)).validate()
