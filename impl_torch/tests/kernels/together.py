"""Programs of one launch beside each other in Triton's interpreter, which by itself runs one after another: each goes on until it arrives
at a barrier or waits there, and often further, so that one is ahead of another wherever no barrier keeps them together."""

from __future__ import annotations

import ctypes
import inspect
import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from triton.runtime import interpreter
from unisono_torch.kernels import barrier

CHANGES = 0.3  # how often another goes on
LOOKS = 10_000  # at barriers where nobody arrives meanwhile


class Turns:
    def __init__(self) -> None:
        self.back, self.random, self.looks = threading.Semaphore(0), random.Random(1), 0

    def take(self, programs: list[Program]) -> None:
        for program in programs:
            program.start()
        program = programs[0]
        while programs:
            if program.ended or self.random.random() < CHANGES:
                program = self.random.choice(programs)
            interpreter.interpreter_builder.set_grid_idx(*program.index)
            program.go.release()
            self.back.acquire()
            if program.error is not None:
                raise program.error
            assert self.looks < LOOKS, "programs wait for each other for ever"
            programs = [each for each in programs if not each.ended]

    def others(self) -> None:
        program = threading.current_thread()
        assert isinstance(program, Program)
        self.back.release()
        program.go.acquire()


class Program(threading.Thread):
    def __init__(self, index: tuple[int, ...], work: Callable[[], None], turns: Turns) -> None:
        super().__init__(daemon=True)
        self.index, self.work, self.turns = index, work, turns
        self.go, self.ended, self.error = threading.Semaphore(0), False, None

    def run(self) -> None:
        self.go.acquire()
        try:
            self.work()
        except Exception as error:
            self.error = error
        self.ended = True
        self.turns.back.release()


class Beside:
    """A kernel, called for one program after another, of which none begins before all are there."""

    def __init__(self, kernel: Any, turns: Turns) -> None:
        self.kernel, self.turns, self.programs = kernel, turns, []
        self.__name__, self.__globals__, self.__signature__ = kernel.__name__, kernel.__globals__, inspect.signature(kernel)

    def __call__(self, **given: Any) -> None:
        builder = interpreter.interpreter_builder
        self.programs.append(Program(builder.grid_idx, lambda: self.kernel(**given), self.turns))
        if len(self.programs) == math.prod(builder.grid_dim):
            self.turns.take(self.programs)


def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """So do programs of every launch of a test."""
    turns, made = Turns(), interpreter.GridExecutor.__init__

    def executor(self: Any, kernel: Any, *rest: Any) -> None:
        made(self, kernel, *rest)
        self.fn = Beside(kernel, turns)

    def count(at: Any) -> ctypes.c_int32:
        return ctypes.c_int32.from_address(int(at.handle.data.item()))

    def arrive(at: Any) -> None:
        count(at).value += 1
        turns.looks = 0
        turns.others()

    def wait(at: Any, wanted: Any) -> None:
        wanted = wanted if isinstance(wanted, int) else int(wanted.handle.data.item())
        while count(at).value < wanted:
            turns.looks += 1
            turns.others()

    monkeypatch.setattr(interpreter.GridExecutor, "__init__", executor)
    monkeypatch.setattr(barrier, "arrive", arrive)
    monkeypatch.setattr(barrier, "wait", wait)
