"""unisono experiment"""

from __future__ import annotations

import shlex
from typing import Literal

from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.commands.arguments import call
from unisono_tools.experiments import drawn, figures, running, tables
from unisono_tools.voice import Voice


def run(
    table: str,
    quick: bool = False,
    jobs: int = 1,
    minutes: float = 0.0,
    out: str = "experiments",
    backend: Literal["torch", "jax"] | None = None,
    device: str | None = None,
    rows: str = "*",
    join: list[str] | None = None,
    draw: str | None = None,
) -> int:
    """Do the runs of a table, or go on with them, and write its results, page and figure.

    Args:
        table: name of a table, `list` for their names, or the path of a folder with table.yaml and a YAML file for each row
        quick: small models and few steps, in minutes on a CPU: whether everything works
        jobs: runs at a time, in as many processes, each of which does one after another; 0 runs none, and writes what is there
        minutes: begin no run after so many; 0 has no limit. The same command goes on
        out: folder of the runs and of the results
        backend: torch or jax; by default what is installed
        device: cpu or cuda; by default the backend's own choice
        rows: only those whose names fit a pattern, such as '*.listops', or one of several with commas between, in whose order they are run;
            the results have all that are there
        join: results files of other calls, as '[here/table1.json, there/table1.json]', whose runs are not run again
        draw: a results file: write its page and figure anew, and run nothing
    """
    console = Voice(soft_wrap=True, highlight=False, markup=False)
    if table == "list":
        for name in tables.names():
            console.print(f"{name:<20} {tables.load(name).title}")
        return 0
    if jobs < 0:
        raise InputError(f"jobs: {jobs}; use a positive number of runs at a time, or 0 for none")
    loaded = tables.load(table, quick)
    folder = expanded(out)
    if draw is None:
        command = shlex.join(
            ["unisono", "experiment", table, *(["--quick"] if quick else []), *(["--jobs", str(jobs)] if jobs > 1 else [])]
        )
        running.join(loaded, folder, join or [], quick, backend=backend, device=device)
        path = running.run(loaded, folder, command, jobs, minutes, console, quick, rows, backend=backend, device=device)
    else:
        path = expanded(draw)
        folder = path.parent
    results = running.load(path)
    if results["table"] != loaded.name:
        raise InputError(f"draw: {path} has the results of {results['table']!r}, not of {table!r}; name that table")
    paths = drawn.write(results, folder)
    for picture in paths[1:]:
        figures.mark(picture, path.read_bytes())
    console.print(paths[0].read_text())
    console.print(f"written: {', '.join(map(str, (path, *paths)))}")
    return 0


def main(argv: list[str]) -> int:
    return call("experiment", run, argv)
