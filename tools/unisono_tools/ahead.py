"""A task's training examples, drawn by other processes ahead of the steps that read them, so that a device need not wait.

`python -m unisono_tools.ahead` reads lines of JSON, first the task, then what is asked of it, and answers each with a length and a
safetensors file. It ends with its input, and so with the run that began it, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import IO

import numpy as np
import safetensors.numpy
from unisono_spec.contract import InputError

from unisono_tools.signals import CAUGHT
from unisono_tools.tasks import Examples, Task, open_task

LENGTH = 8  # bytes that say how many follow
Asked = Callable[[int], tuple[str, np.ndarray]]


class Ahead:
    """Which process draws a step changes nothing in what is drawn."""

    def __init__(self, task: Task, seed: int, workers: int) -> None:
        self.seed = seed
        command = [sys.executable, "-m", "unisono_tools.ahead"]
        # in a session of their own: Ctrl-C is the run's
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) for _ in range(workers)
        ]
        self.steps: list[int | None] = [None] * workers  # what each has been asked for
        self.end = weakref.finalize(self, _end, self.processes)
        first = {"name": task.name, "options": dataclasses.asdict(task)}  # pyright: ignore[reportArgumentType]
        for worker in range(workers):
            self._say(worker, first)

    def examples(self, step: int, asked: Asked) -> Examples:
        """Those of a step. Those of the following ones are then being drawn, each by the process whose turn it is.

        asked: step → setting and numbers [B] of its examples.
        """
        number = len(self.processes)
        for later in range(step, step + number):
            worker = later % number
            if self.steps[worker] != later:
                if self.steps[worker] is not None:  # a step that is not wanted any more
                    self._answer(worker)
                self._ask(worker, later, *asked(later))
        found = self._answer(step % number)
        self._ask(step % number, step + number, *asked(step + number))
        return found

    def _ask(self, worker: int, step: int, setting: str, numbers: np.ndarray) -> None:
        self._say(worker, {"setting": setting, "numbers": numbers.tolist(), "seed": self.seed})
        self.steps[worker] = step

    def _say(self, worker: int, what: dict[str, object]) -> None:
        stdin = self.processes[worker].stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer, which is missing, says so
            stdin.write(json.dumps(what).encode() + b"\n")
            stdin.flush()

    def _answer(self, worker: int) -> Examples:
        stdout = self.processes[worker].stdout
        assert stdout is not None
        size = int.from_bytes(stdout.read(LENGTH), "little")
        data = stdout.read(size)
        if not size or len(data) < size:
            status = self.processes[worker].wait()
            raise InputError(f"data.workers: a process that draws examples ended with status {status}; use fewer, or 0 to draw without any")
        return Examples(**safetensors.numpy.load(data))


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        with contextlib.suppress(BrokenPipeError), process:  # its pipes are closed, and it is waited for
            pass


def serve(questions: IO[str], answers: IO[bytes]) -> None:
    """Answer each question with its examples."""
    first = json.loads(questions.readline())
    task = open_task(first["name"], first["options"])
    for line in questions:
        asked = json.loads(line)
        found = task.examples("train", asked["setting"], np.array(asked["numbers"]), asked["seed"])
        data = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in vars(found).items() if a is not None})
        answers.write(len(data).to_bytes(LENGTH, "little") + data)
        answers.flush()


def main() -> int:
    for number in CAUGHT:  # the run decides when to end
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        serve(sys.stdin, answers)
    except BrokenPipeError:  # the run has ended
        pass
    except InputError as error:  # say, a file that is gone since
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
