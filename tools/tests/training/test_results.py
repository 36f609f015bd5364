"""What tables keep of their runs, and the committed results: they load, fit their tables of today, and can be joined."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from rich.console import Console
from unisono_spec.contract import InputError, config_to_dict
from unisono_tools.experiments import drawn, figures, running, tables, worker
from unisono_tools.train import Result

RESULTS = Path(__file__).parents[3] / "docs" / "results"
FILES = sorted(path for path in RESULTS.glob("*.json") if "table" in json.loads(path.read_text("utf-8")))
MADE = ("date", "device", "versions", "commit")  # what joining says of each run


def test_every_table_has_results():
    assert {path.stem for path in FILES} == set(tables.names())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_results_fit_their_table(path, tmp_path):
    found = running.load(path)
    table = tables.load(found["table"], found["quick"])
    with_runs = [row for row in found["rows"] if row["runs"]]
    assert with_runs
    assert found["page"].keys() == tables.page(table).keys()
    assert [row["row"] for row in found["rows"]] == [name for name in table.rows if name in {row["row"] for row in found["rows"]}]
    differing = {row["row"]: names for row in with_runs if (names := running._differs(table.rows[row["row"]], row))}
    if "apart" in found:
        assert differing
        with pytest.raises(InputError, match=f"{path.name} stands apart: .*; name other files"):
            running.join(table, tmp_path, [str(path)], found["quick"])
        return
    assert not differing
    running.join(table, tmp_path, [str(path)], found["quick"])
    joined = json.loads(running.run(table, tmp_path, "", 0, 0.0, Console(quiet=True), found["quick"]).read_text("utf-8"))
    rows = {row["row"]: row for row in joined["rows"]}
    for row in found["rows"]:
        now = rows[row["row"]]
        for field in row.keys() - {"train", "runs", "not_run"}:  # time and why a row has none are not what was measured
            assert row[field] == now[field], (row["row"], field)
        without = [[{key: value for key, value in run.items() if key not in MADE} for run in each["runs"]] for each in (row, now)]
        assert without[0] == without[1]
        assert all(run.keys() >= set(MADE) for run in now["runs"])


def test_settings_that_change_nothing_learned_may_differ():
    table = tables.load("table1")
    name, row = next((name, row) for name, row in table.rows.items() if name.endswith(".pathfinder") and not row.not_run)
    found = {"config": json.loads(json.dumps(config_to_dict(tables.config_of(row)))), "train": json.loads(json.dumps(row.train))}
    found["train"]["max_minutes"], found["train"]["data"]["workers"] = 1, 0
    assert running._differs(row, found) == [], name
    found["train"]["data"]["task"] = "image"
    assert running._differs(row, found) == ["train.data.task"]


@pytest.mark.parametrize(
    ("steps", "why", "number", "status", "said"),
    [
        (9, None, None, "done", ""),
        (5, None, None, "out of time", " (out of time at step 5 of 9)"),
        (5, "no better validation since step 3", None, "done", " (no better validation since step 3 at step 5 of 9)"),
        (5, None, signal.SIGTERM, "stopped by SIGTERM", " (stopped by SIGTERM at step 5 of 9)"),
    ],
)
def test_a_table_tells_what_ended_a_run(tiny, monkeypatch, tmp_path, steps, why, number, status, said):
    """With patience, too, which does not make a run that time or a signal cut short a finished one."""
    train = tiny(steps=9, patience=2)
    monkeypatch.setattr(worker, "run", lambda *_, **__: Result(tmp_path, tmp_path, None, steps, 9, why, number))
    monkeypatch.setattr(worker, "_tested", lambda *_: {"tests": {"bits": 1.0}})
    monkeypatch.setattr(worker, "read_log", lambda _: [{"step": 1, "validation_bits": 2.0}])
    found = worker.work(train)
    assert (found["status"], found["of"], found.get("ended")) == (status, 9, why)
    assert drawn._early({"rate": found["lr"], "runs": [found]}) == said


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([], ("not run", "not reached")),
        ([("done", 9)], ("not run", "not reached")),  # at a learning rate that does not count
        ([("out of time", 5), ("done", 9), ("out of time", 3)], ("not finished", "out of time at step 5 of 9")),
        ([("failed: no memory", 0)], ("failed", "no memory")),
    ],
)
def test_a_row_without_figures_says_why(runs, said):
    assert drawn._why({"not_run": "", "runs": [{"status": status, "steps": steps, "of": 9} for status, steps in runs]}) == said


def test_a_run_that_failed_after_a_validation_has_no_step():
    row = {"rate": 0.1, "runs": [{"lr": 0.1, "score": 2.0, "status": "failed: no memory", "steps": 0, "of": 9}]}
    assert drawn._early(row) == " (failed: no memory)"


def test_a_model_against_its_state_has_the_spread_of_its_seeds(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(figures, "against", lambda path, lines, *_: found.update(lines))
    runs = [{"lr": 1.0, "score": 0.5, "metric": "accuracy", "tests": {"8x1": low, "8x2": 1.0}} for low in (0.0, 0.5)]
    rows = [{"label": f"lat, width {w}", "state_bytes": 4 * w, "rate": 1.0, "runs": runs[:n]} for w, n in ((8, 1), (2, 2), (4, 0))]
    drawn.draw({"rows": rows, "page": {"figure": "state", "title": "one"}}, tmp_path / "a.png")
    assert found == {"lat": [(8.0, 0.625, 0.5, 0.75), (32.0, 0.5, 0.5, 0.5)]}
