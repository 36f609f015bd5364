"""Contestants in processes of their own: they compile and tune at once, then each is timed while the others wait.

So contestants take as long as the slowest of them compiles, and one that ends its process, or never ends, costs its own row only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.context
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

Turn = Callable[[], None]  # says that all is compiled, and waits until the device is free
Contest = Callable[..., Any]  # of a task's arguments and a Turn: what was measured


def rows(
    contest: Contest, tasks: Sequence[tuple[Any, ...]], patience: float, at_once: int | None = None
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(task, what `contest(*task, turn)` measured, or in words why it did not), in the order of `tasks`, each as soon as it is there.

    contest: a module's function. patience: seconds that all may compile, and then each be timed; 0: one by one, in this process.
    at_once: so many compile and are timed before the next ones begin; None: all.
    """
    if not patience:
        yield from ((task, contest(*task, lambda: None)) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")  # what is imported once is forked; no process inherits a GPU's context
    context.set_forkserver_preload([contest.__module__])
    number = at_once or max(1, len(tasks))
    for first in range(0, len(tasks), number):
        yield from _group(context, contest, tasks[first : first + number], patience)


def side_by_side(contest: Contest, tasks: Sequence[tuple[Any, ...]], at_once: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """As `rows`, in threads of this process, and each waits until its group has compiled.

    For a compiler that times a product's forms on the device: of processes that ask for it at once each may wait
    for all. One that ends the process, or never compiles, ends them all.
    """
    for first in range(0, len(tasks), at_once):
        group = [_Thread(contest, task) for task in tasks[first : first + at_once]]
        for each in group:
            each.ready.wait()
        for each in group:
            each.turn.set()
            each.join()
            yield each.task, each.said


class _Thread(threading.Thread):
    def __init__(self, contest: Contest, task: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self.contest, self.task, self.said = contest, task, None
        self.ready, self.turn = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        def turn() -> None:
            self.ready.set()
            self.turn.wait()

        try:
            self.said = self.contest(*self.task, turn)
        except (Exception, SystemExit) as error:  # else whoever waits for all would wait for ever
            self.said = _refused(error)
        self.ready.set()


def _group(
    context: multiprocessing.context.ForkServerContext, contest: Contest, tasks: Sequence[tuple[Any, ...]], patience: float
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    held = []
    for task in tasks:
        mine, its = context.Pipe()
        process = context.Process(target=_work, args=(its, contest, task))
        process.start()
        its.close()
        held.append((task, process, mine))
    try:
        deadline = time.monotonic() + patience
        waiting = [(task, mine, _answer(mine, deadline - time.monotonic())) for task, _, mine in held]
        for (_, process, _), (_, _, said) in zip(held, waiting, strict=True):
            if said is not None:  # nothing compiles while others are timed
                process.kill()
                process.join()
        for (_, process, _), (task, mine, said) in zip(held, waiting, strict=True):
            if said is None:  # its turn
                with contextlib.suppress(BrokenPipeError):  # it has ended, as its answer says
                    mine.send(None)
                said = _answer(mine, patience)
            yield task, said
            process.kill()
            process.join()  # and its memory is free
    finally:
        for _, process, _ in held:
            process.kill()
            process.join()


def _answer(mine: Connection, seconds: float) -> Any:
    try:
        return mine.recv() if mine.poll(max(0.0, seconds)) else f"not ready after {max(0.0, seconds):.0f} s"
    except (EOFError, ConnectionResetError):
        return "its process ended"


def _work(its: Connection, contest: Contest, task: tuple[Any, ...]) -> None:
    above = multiprocessing.parent_process()
    if above is not None:  # a contestant that compiles does not outlive a run that is cut
        threading.Thread(target=lambda: wait([above.sentinel]) and os._exit(1), daemon=True).start()

    def turn() -> None:
        its.send(None)
        its.recv()

    try:
        its.send(contest(*task, turn))
    except EOFError:  # nobody waits any more
        return
    except Exception as error:  # a contestant that refuses is told of, and the others go on
        its.send(_refused(error))


def _refused(error: Exception | SystemExit) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def compile_at_once() -> None:
    """Let Triton's autotuner compile a kernel's configurations side by side before it times them; by itself it goes one by one.

    flash-linear-attention tries some 200 at each width, two seconds each. What it keeps on disk of an earlier run is not tried again.
    """
    from triton.runtime._async_compile import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    prune, from_disk = Autotuner.prune_configs, Autotuner.check_disk_cache

    def compile_all(self: Any, kwargs: dict[str, Any], configs: list[Any]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                with contextlib.suppress(Exception):  # what cannot be compiled says so when it is timed
                    self.fn.run(*self.nargs.values(), **{**kwargs, **config.all_kwargs(), "warmup": True})

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        self.given = kwargs
        if not self.cache_results:
            compile_all(self, kwargs, configs)
        return configs

    def check_disk_cache(self: Any, tuning_key: Any, configs: list[Any], bench_fn: Callable[[], None]) -> bool:
        def both() -> None:
            compile_all(self, self.given, configs)
            bench_fn()

        return from_disk(self, tuning_key, configs, both)

    Autotuner.prune_configs, Autotuner.check_disk_cache = prune_configs, check_disk_cache
