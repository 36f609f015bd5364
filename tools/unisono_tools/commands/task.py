"""unisono task"""

from __future__ import annotations

import sys
from typing import Any, Literal

from rich.console import Console
from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.commands.arguments import call
from unisono_tools.tasks import names, open_task
from unisono_tools.tasks.base import SPLITS, Task

EXAMPLES, ALL = 1000, sys.maxsize


def run(
    name: str,
    task_options: dict[str, Any] | None = None,
    baselines: bool = False,
    split: Literal["validation", "test"] = "test",
    examples: int = 0,
    write: str | None = None,
) -> int:
    """What a task asks, how many examples it has, and what a predictor reaches that knows nothing of order.

    Args:
        name: name of a task, or `list` for their names.
        task_options: what differs from the task's published parameters.
        baselines: judge the trivial predictors.
        split: what they are judged on.
        examples: of each setting so many; by default 1,000, or all of a data set. With --write, of each split.
        write: a file for the task's data set, as --data.task_options.dataset reads it where no network is; smaller if it ends in .xz.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if name == "list":
        for one in names():
            about = sys.modules[type(open_task(one)).__module__].__doc__ or ""
            console.print(f"{one:<12} {about.splitlines()[0]}")
        return 0
    if examples < 0:
        raise InputError(f"examples: {examples}; use a positive number, or 0 for the default")
    task = open_task(name, task_options)
    shown = f"frames of {task.frame_size}" if task.frame_size else f"{task.vocab_size} ids"
    console.print(f"{name} ({task.source}), judged by {task.metric or 'bits a target'}, {shown}")
    for part in SPLITS:
        for setting in task.settings(part):
            size = task.size(part, setting)
            many = "without end" if size is None else f"{size:,} examples"
            console.print(f"{part:<12} {setting:<12} {task.length(setting):>8,} {'frames' if task.frame_size else 'tokens'}  {many}")
    if write is not None:
        path = expanded(write)
        task.write(path, examples)
        console.print(f"written: {path}, {path.stat().st_size:,} bytes")
    if baselines:
        for setting, found in task.baselines(split, examples or (ALL if _finite(task, split) else EXAMPLES)).items():
            for what, score in found.items():
                console.print(f"{split:<12} {setting:<12} {what:<20} {score:.4f}")
    return 0


def _finite(task: Task, split: str) -> bool:
    return all(task.size(split, setting) is not None for setting in task.settings(split))


def main(argv: list[str]) -> int:
    return call("task", run, argv)
