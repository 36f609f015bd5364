"""The runs of a table: as many at once as asked for, each continued where an earlier call left it; results in one JSON file."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from unisono_spec.contract import InputError, config_to_dict, count_params, nearest
from unisono_spec.contract.errors import shown
from unisono_spec.contract.files import write_bytes
from unisono_spec.contract.plain import expanded, read_json

from unisono_tools.config import TrainConfig, dump, flatten
from unisono_tools.experiments import tables
from unisono_tools.experiments.tables import Row, Table, config_of
from unisono_tools.experiments.worker import CONFIG, RESULT, do, origin
from unisono_tools.signals import obey
from unisono_tools.voice import Voice

ALIKE = ("train.max_minutes", "train.data.workers")  # settings that leave what is learned at a step as it is
MOST = 1 << 26  # bytes of a results file
PARTS = {"table", "page", "quick", "about", "rows"}  # of its contents; besides, why it stands `apart`
OF_A_ROW = {"row", "label", "config", "train", "runs"}


def path_of(table: Table, out: Path) -> Path:
    return out / f"{table.name}.json"


def run(
    table: Table, out: Path, command: str, jobs: int, minutes: float, console: Console, quick: bool = False, rows: str = "*", **options: Any
) -> Path:
    """Do what is not done yet, and write the results after each run; a run that is not `done` is taken up again.

    jobs: at a time; with none, what is there is written. minutes: none is begun after so many. rows: patterns of their names with commas
    between, in whose order they are done. options: fields of TrainConfig.
    """
    if not 0 <= minutes < math.inf:
        raise InputError(f"minutes: {minutes}; use a positive number, or 0 for no limit")
    runnable = [name for name, row in table.rows.items() if not row.not_run]
    meant = {pattern: fnmatch.filter(runnable, pattern) for pattern in rows.split(",")}
    for pattern, fits in meant.items():
        if not fits:
            raise InputError(f"rows: {shown(pattern)} fits none that is run; {nearest(pattern, table.rows)}")
    active = list(dict.fromkeys(name for fits in meant.values() for name in fits))
    for name, base in ((name, table.rows[name].rate_of) for name in active if jobs):
        if base and base not in active and _best(table, base, out, options) is None:
            raise InputError(f"rows: {shown(rows)}: {name} takes the rate of {base}, which has no run yet; name that row, too")
    out.mkdir(parents=True, exist_ok=True)
    path, deadline = path_of(table, out), time.monotonic() + 60 * minutes if minutes else math.inf
    header = {"table": table.name, "page": tables.page(table), "quick": quick}
    here = origin(options.get("backend"), options.get("device"))

    def write() -> None:
        rows = [_row(table, name, out, options) for name in table.rows]
        runs = [run for row in rows for run in row["runs"]]
        made = {key: "; ".join(dict.fromkeys(run[key] for run in runs if run.get(key))) or value for key, value in here.items()}
        write_bytes(path, json.dumps({**header, "about": {"command": command, **made}, "rows": rows}, indent=1).encode())

    def phase(runs: list[TrainConfig]) -> None:
        for done in pool([run for run in runs if _result(run).get("status") != "done"], jobs, deadline):
            found = _result(done)
            console.print(f"{Path(done.out).name}: {found.get('status', 'no result')}, {found.get('score')}")
            write()

    write()
    # the first seed of a row with every learning rate, then the others, and rows that take its rate, with the best
    tried = [(name, table.rows[name].seeds[0], rate) for name in active if not table.rows[name].rate_of for rate in table.rows[name].rates]

    def known() -> list[tuple[str, int, float]]:
        """The first seed of all, then the others."""
        rates = {name: _best(table, name, out, options) for name in active}
        found = [(at, name, rate) for name, rate in rates.items() if rate for at in range(len(table.rows[name].seeds))]
        return [(name, table.rows[name].seeds[at], rate) for at, name, rate in sorted(found, key=lambda run: run[0])]

    def settled() -> list[tuple[str, int, float]]:
        """Of what is known, the rows whose rates were all tried before."""
        begun = {base for base, seed, rate in tried if not _result(tables.plan(table, base, seed, rate, out, **options))}
        return [run for run in known() if (table.rows[run[0]].rate_of or run[0]) not in begun]

    for chosen in (lambda: [*tried, *settled()], known) if jobs else ():
        phase([tables.plan(table, name, seed, rate, out, **options) for name, seed, rate in dict.fromkeys(chosen())])
    write()
    return path


def pool(runs: list[TrainConfig], jobs: int, deadline: float = math.inf) -> Iterator[TrainConfig]:
    """Each run once it has ended. One at a time in this process; more in processes of their own, which take one after another."""
    waiting: deque[TrainConfig] = deque()
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(run.folder / CONFIG, dump(run).encode())
        waiting.append(run)
    if jobs == 1:
        while waiting and time.monotonic() < deadline:
            run = waiting.popleft()
            do(run.folder, console=Voice(stderr=True))
            yield run
            name = str(_result(run).get("status")).partition("stopped by ")[2]
            obey(signal.Signals[name] if name else None)
        return
    ended: queue.SimpleQueue[TrainConfig | None] = queue.SimpleQueue()
    threads = [threading.Thread(target=_serve, args=(waiting, ended, deadline), daemon=True) for _ in range(min(jobs, len(waiting)))]
    for thread in threads:
        thread.start()
    left = len(threads)
    while left:
        run = ended.get()
        left -= run is None
        if run is not None:
            yield run


def _serve(waiting: deque[TrainConfig], ended: queue.SimpleQueue[TrainConfig | None], deadline: float) -> None:
    """Have a process do one run after another, another process after one that ended early; None is put in the end."""
    process = None
    with contextlib.suppress(IndexError):  # none is left
        while time.monotonic() < deadline:
            run = waiting.popleft()
            if process is None:
                command = [sys.executable, "-m", "unisono_tools.experiments.worker"]
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps(str(run.folder)), file=process.stdin, flush=True)
            if not process.stdout.readline():
                process.communicate()
                process = None
            ended.put(run)
    if process is not None:
        process.communicate()
    ended.put(None)


def _result(run: TrainConfig) -> dict[str, Any]:
    path = run.folder / RESULT
    return read_json(path.read_bytes(), str(path), "remove it", MOST) if path.is_file() else {}


def _best(table: Table, name: str, out: Path, options: dict[str, Any]) -> float | None:
    """The learning rate whose first seed did best; None where none has ended."""
    row = table.rows[name]
    if row.rate_of:
        return _best(table, row.rate_of, out, options)
    if len(row.rates) == 1:
        return row.rates[0]
    found = {rate: _result(tables.plan(table, name, row.seeds[0], rate, out, **options)) for rate in row.rates}
    done = {rate: r for rate, r in found.items() if r.get("score") is not None and r.get("status") == "done"}
    # fewer bits, or more of what a task counts
    scores = {rate: -r["score"] if r["metric"] == "bits" else r["score"] for rate, r in done.items()}
    return max(scores, key=lambda rate: scores[rate]) if scores else None


def _rates(table: Table, row: Row) -> list[float]:
    return table.rows[row.rate_of].rates if row.rate_of else row.rates


def _row(table: Table, name: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What the results say of a row: every run of it that there is, and which learning rate counts."""
    row, config = table.rows[name], config_of(table.rows[name])
    rate = _best(table, name, out, options)
    plans = [tables.plan(table, name, seed, each, out, **options) for seed in row.seeds for each in _rates(table, row)]
    runs = [found for each in plans if (found := _result(each))]
    return {
        "row": name,
        "label": row.label,
        "model": row.model,
        "parameters": count_params(config),
        "state_bytes": tables.state_bytes(config, tables.length(row)),
        "config": config_to_dict(config),
        "task": row.task,
        "rates": [] if row.rate_of else row.rates,
        "rate": rate,
        "not_run": row.not_run,
        "seeds": row.seeds,
        "train": _settings(row),
        "runs": runs,
    }


def join(table: Table, out: Path, files: list[str], quick: bool = False, **options: Any) -> None:
    """Take in the runs of other calls' results, each where it went further than what is there; InputError where settings differ, as a
    learning rate or a seed that the table has not."""
    for file in files:
        results = load(expanded(file))
        if results["table"] != table.name or results["quick"] != quick:
            whose = f"{results['table']!r}{', of --quick' if results['quick'] else ''}"
            raise InputError(f"join: {file} has the results of {whose}; name files of this table")
        if "apart" in results:
            raise InputError(f"join: {file} stands apart: {results['apart']}; name other files")
        for row in filter(lambda row: row["runs"], results["rows"]):
            if row["row"] not in table.rows:
                raise InputError(f"join: {file}: {row['row']!r} is no row of the table; {nearest(row['row'], table.rows)}")
            other = _differs(table.rows[row["row"]], row)
            if other:
                raise InputError(f"join: {file}: {row['row']} was run with other {', '.join(other)}; run it anew, or join the others")
            asked = table.rows[row["row"]]
            for run in row["runs"]:
                for field, value, known in (("lr", run["lr"], _rates(table, asked)), ("seed", run["seed"], asked.seeds)):
                    if value not in known:
                        raise InputError(
                            f"join: {file}: a run of {row['row']} has {field} {value:g}, the table {', '.join(map(str, known))}; "
                            f"add it to the table's {'rates' if field == 'lr' else 'seeds'}, or take the run out of the file"
                        )
                plan = tables.plan(table, row["row"], run["seed"], run["lr"], out, **options)
                old = _result(plan)
                if not old or _reached(old) < _reached(run):
                    plan.folder.mkdir(parents=True, exist_ok=True)
                    made = {key: value for key, value in results["about"].items() if key != "command"}
                    write_bytes(plan.folder / RESULT, json.dumps(made | run).encode())


def _differs(row: Row, found: dict[str, Any]) -> list[str]:
    """Which settings a row of results was made with that this one has not, but for those that leave what is learned as it is."""
    now = json.loads(json.dumps({"config": config_to_dict(config_of(row)), "train": _settings(row)}))
    new, old = flatten(now), flatten({part: found[part] for part in now})
    return [name for name in {**new, **old} if new.get(name) != old.get(name) and name not in ALIKE]


def _settings(row: Row) -> dict[str, Any]:
    return row.train | {"data": row.train.get("data", {})}


def _reached(run: dict[str, Any]) -> tuple[bool, int]:
    return run["status"] == "done", run["steps"]


def load(path: Path) -> dict[str, Any]:
    """A results file. InputError where it is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); run the experiment first") from error
    found = read_json(data, str(path), "run the experiment again", MOST)
    rows = found["rows"] if isinstance(found, dict) and found.keys() >= PARTS else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= OF_A_ROW for row in rows):
        raise InputError(f"{path}: no results of `unisono experiment`; run it again")
    return found
