"""Tables of measurements: read, planned, run, taken up again, and drawn from their results alone."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from unisono_spec.contract import InputError, count_params
from unisono_spec.contract.files import load_params
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_tools.experiments import compare, drawn, playground, running, scales, tables
from unisono_tools.train.checkpoint import model_file


@pytest.fixture
def small(tmp_path, text):
    """A table of two rows and one that is not run."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "table.yaml").write_text(
        f"title: Small\nrow:\n  model: cram (adaptive)\n  overrides: {{d_model: 8, n_layers: 1}}\n  seeds: [0]\n  train: {{steps: 2, "
        f"batch_size: 2, seq_len: 8, data: {{corpus: {text}, eval_tokens: 64}}}}\nquick: {{seeds: [0], train: {{steps: 1}}}}\n"
    )
    (folder / "0-printed.yaml").write_text("label: printed\n")
    (folder / "1-rates.yaml").write_text("label: two rates\nrates: [0.001, 0.01]\noverrides: {learned_decay: true}\nseeds: [0, 1]\n")
    (folder / "2-left.yaml").write_text("label: left out\nnot_run: too large\n")
    return folder


def test_a_table_is_run_resumed_and_drawn_from_its_results(small, command, tmp_path):
    out = tmp_path / "out"
    argv = ("experiment", small, "--out", out)
    code, said, told = command(*argv)
    assert (code, told.count("step 2/2  loss")) == (0, 4)  # as often as there are runs
    results = json.loads((out / "small.json").read_text())
    assert set(results["about"]) >= {"command", "date", "device", "versions", "commit"}
    rows = {row["row"]: row for row in results["rows"]}
    assert [len(rows[name]["runs"]) for name in sorted(rows)] == [1, 3, 0]
    # the better rate of the first seed is the second seed's
    first = {run["lr"]: run["score"] for run in rows["1-rates"]["runs"] if run["seed"] == 0}
    assert rows["1-rates"]["rate"] == min(first, key=lambda rate: first[rate])
    assert {(run["seed"], run["lr"]) for run in rows["1-rates"]["runs"]} == {(0, 0.001), (0, 0.01), (1, rows["1-rates"]["rate"])}
    for run in rows["0-printed"]["runs"]:
        assert (run["status"], run["steps"]) == ("done", 2)
        assert run["score"] == min(value for _, value in run["curve"])
        assert run["tests"]["bits"] > 0
        assert run["parameters"] == count_params(tables.config_of(tables.load(str(small)).rows["0-printed"]))
    assert "not run: too large" in said
    # nothing is done twice
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    running.run(tables.load(str(small)), out, "again", 1, 0.0, Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before
    # the page comes from the results alone
    at = rows["1-rates"]["rate"]
    for run, score in zip((run for run in rows["1-rates"]["runs"] if run["lr"] == at), (1.25, 1.75), strict=True):
        run["score"] = score
    assert "1.500 (1.250–1.750)" in drawn.markdown(results)
    assert "1.500 (1.250–1.750)" not in (out / "small.md").read_text()


def test_no_run_is_begun_after_the_minutes(small, tmp_path, monkeypatch):
    table, clock, begun = tables.load(str(small)), [0.0], []

    def forty_seconds(folder, **_):
        begun.append(folder.name)
        clock[0] += 40

    def now():
        clock[0] += 1e-3
        return clock[0]

    monkeypatch.setattr(running, "do", forty_seconds)
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=now))
    running.run(table, tmp_path / "alone", "here", 1, 1.0, Console(quiet=True))
    assert len(begun) == 2  # at 0 and 40 seconds, of three
    for jobs in (1, 2):
        path = running.run(table, tmp_path / "none", "here", jobs, 1e-9, Console(quiet=True))
        assert [row["runs"] for row in json.loads(path.read_text())["rows"]] == [[]] * 3


def test_a_signal_that_ends_a_run_ends_the_table(small, tmp_path, monkeypatch):
    begun = []

    def stopped(folder, **_):
        begun.append(folder.name)
        (folder / "result.json").write_text('{"status": "stopped by SIGINT", "seed": 0, "lr": 0.001, "steps": 1, "of": 8}')

    monkeypatch.setattr(running, "do", stopped)
    for calls in (1, 2):  # the same command goes on with the run that was cut
        with pytest.raises(SystemExit, match="130"):
            running.run(tables.load(str(small)), tmp_path, "here", 1, 0.0, Console(quiet=True))
        assert len(begun) == calls
    assert begun[0] == begun[1]


def test_a_signal_that_ends_a_run_ends_what_trains_several(tmp_path, monkeypatch):
    def stopped(*_):
        return SimpleNamespace(signal=signal.SIGINT)

    monkeypatch.setattr(compare, "train", stopped)
    monkeypatch.setattr(playground, "train", stopped)
    nothing: Any = None
    with pytest.raises(SystemExit, match="130"):
        compare.learn({"a": [nothing]}, nothing, 1, Console(quiet=True))
    with pytest.raises(SystemExit, match="130"):
        playground._trained(tmp_path, "sotu", 1)


@pytest.mark.parametrize(("metric", "better"), [("bits", 0.001), ("accuracy", 0.01)])
def test_the_better_rate_has_fewer_bits_or_a_higher_score(small, tmp_path, metric, better):
    """Bits decide in a task without a metric (dna), too."""
    (small / "1-rates.yaml").write_text("label: two\nrates: [0.001, 0.01]\ntrain: {data: {task: dna}}\nvocab: 256\n")
    table = tables.load(str(small))
    for rate, score in ((0.001, 0.5), (0.01, 0.75)):
        folder = tables.plan(table, "1-rates", 0, rate, tmp_path).folder
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"status": "done", "score": score, "metric": metric}))
    assert running._best(table, "1-rates", tmp_path, {}) == better


@pytest.fixture
def two_tasks(tmp_path, text):
    """A table with a text, whose better learning rate a task then takes, and another, with its own, that is not run."""
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "table.yaml").write_text(
        f"title: Two\nfigure: none\ntasks:\n  text:\n    label: text, bits\n    rates: [0.001, 0.01]\n    seeds: [0, 1]\n"
        f"    train: {{seq_len: 8, data: {{corpus: {text}, eval_tokens: 64}}}}\n"
        "  copying: {bits: b, train: {data: {task: copying, task_options: {shortest: 1, longest: 3, test: [3, 4]}, eval_examples: 4}}}\n"
        "  far: {not_run: too long, rates: [0.5]}\nmean: {mean: [copying, far]}\n"
        "row:\n  vocab: 256\n  model: cram (adaptive)\n  overrides: {d_model: 8, n_layers: 1}\n  seeds: [0]\n"
        "  train: {steps: 2, batch_size: 2}\n"
    )
    (folder / "0-printed.yaml").write_text("label: printed\n")
    (folder / "1-decay.yaml").write_text("label: decay\noverrides: {learned_decay: true}\ntasks: {copying: {not_run: slow}}\n")
    return folder


def test_a_table_of_tasks_chooses_its_rate_at_the_first(two_tasks, command, tmp_path):
    out = tmp_path / "out"
    code, said, _ = command("experiment", two_tasks, "--out", out, "--rows", "0-*")
    rows = {row["row"]: row for row in json.loads((out / "two.json").read_text())["rows"]}
    assert (code, list(rows)) == (0, [f"{model}.{task}" for model in ("0-printed", "1-decay") for task in ("text", "copying", "far")])
    assert [len(row["runs"]) for row in rows.values()] == [3, 1, 0, 0, 0, 0]
    text, copying = rows["0-printed.text"], rows["0-printed.copying"]
    first = {run["lr"]: run["score"] for run in text["runs"] if run["seed"] == 0}
    assert text["rate"] == copying["rate"] == copying["runs"][0]["lr"] == min(first, key=lambda rate: first[rate])
    assert copying["parameters"] == text["parameters"]
    tests, bits = (copying["runs"][0][name].values() for name in ("tests", "bits"))
    each = " / ".join(f"{100 * score:.1f}" for score in tests)
    assert "| copying | b | far | mean: copying |" in said
    assert f"| {each} | {' / '.join(f'{one:.2f}' for one in bits)} | – | {100 * sum(tests) / 2:.1f} |" in said
    for line in ("- copying, not run for decay: slow", "- far, not run for printed, decay: too long", f"| {text['rate']:g} / 0.5 |"):
        assert line in said
    assert not (out / "two.png").exists()


def test_a_mean_counts_only_what_all_models_were_run_on(two_tasks, tmp_path):
    """A model that was run on none of its tasks does not count; one that was run on some has no figure for the others."""
    table = tables.load(str(two_tasks))
    results = {"page": tables.page(table), "rows": []}
    scores = {"0-printed": {"copying": 0.5, "far": 0.25}, "1-decay": {"copying": 0.75}}
    for name, row in table.rows.items():
        found = scores[name.split(".")[0]].get(row.task)
        runs = [{"lr": 1, "score": found, "tests": {"4": found}, "status": "done", "metric": "accuracy"}] if found else []
        results["rows"].append({"row": name, "label": row.label, "task": row.task, "rate": 1, "not_run": row.not_run, "runs": runs})
    lines = drawn.by_task(results)
    assert lines[1].endswith("| mean: copying |")
    assert [line.split(" | ")[-1] for line in lines[3:5]] == ["50.0 |", "75.0 |"]
    for row in results["rows"]:
        if row["row"] == "1-decay.copying":
            row["runs"] = []
    assert [line.split(" | ")[-1] for line in drawn.by_task(results)[3:5]] == ["37.5 |", "– |"]


def test_results_of_several_calls_become_one(two_tasks, command, refused, tmp_path):
    """What another call did is not run again, the run that went further counts, and each keeps where it was made."""
    first, second = tmp_path / "a" / "two.json", tmp_path / "b" / "two.json"
    assert command("experiment", two_tasks, "--out", first.parent, "--rows", "0-*")[0] == 0
    there = json.loads(first.read_text())
    there["about"]["device"] = "elsewhere"
    for row in there["rows"]:
        for run in row["runs"]:
            run["device"] = "elsewhere"
            if row["row"] == "0-printed.copying":
                run |= {"status": "out of time", "steps": 1}
    first.write_text(json.dumps(there))
    assert command("experiment", two_tasks, "--out", second.parent, "--join", f"[{first}]", "--rows", "1-*.text,0-*")[0] == 0
    rows = {row["row"]: row["runs"] for row in json.loads(second.read_text())["rows"]}
    assert {run["device"] for run in rows["0-printed.text"]} == {"elsewhere"}
    assert [run["status"] for run in rows["0-printed.copying"]] == ["done"]
    assert len(rows["1-decay.text"]) == 3
    here = rows["1-decay.text"][0]["device"]
    assert command("experiment", two_tasks, "--out", tmp_path / "c", "--join", f"[{second}, {first}]", "--jobs", 0)[0] == 0
    joined = json.loads((tmp_path / "c" / "two.json").read_text())
    assert {row["row"]: row["runs"] for row in joined["rows"]} == rows
    assert joined["about"]["device"] == f"elsewhere; {here}"
    for field, value in (("lr", 0.5), ("seed", 7)):
        for row in ("0-printed.text", "0-printed.copying"):  # which takes the rate of the other
            foreign = json.loads(second.read_text())
            next(each for each in foreign["rows"] if each["row"] == row)["runs"][0][field] = value
            (tmp_path / "foreign.json").write_text(json.dumps(foreign))
            assert f"a run of {row} has {field} {value}, the table 0" in refused(
                "experiment", two_tasks, "--out", tmp_path / "e", "--join", f"[{tmp_path / 'foreign.json'}]"
            )
    (two_tasks / "0-printed.yaml").write_text("label: printed\ntrain: {steps: 3}\n")
    assert "0-printed.text was run with other train.steps" in refused(
        "experiment", two_tasks, "--out", tmp_path / "d", "--join", f"[{second}]"
    )
    assert "has the results of 'two'; name files of this table" in refused("experiment", "mqar", "--out", tmp_path, "--join", f"[{second}]")


def test_runs_come_in_the_order_of_the_patterns_and_the_first_seed_before_the_others(two_tasks, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(running, "pool", lambda runs, jobs, deadline: done.extend(Path(run.out).name for run in runs) or iter(()))
    for rate in (0.001, 0.01):
        for name in ("0-printed", "1-decay"):
            folder = tables.plan(tables.load(str(two_tasks)), f"{name}.text", 0, rate, tmp_path).folder
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"status": "done", "score": rate, "metric": "bits"}))
    running.run(tables.load(str(two_tasks)), tmp_path, "", 1, 0.0, Console(quiet=True), rows="*.copying,1-*,*.text")
    assert done[:3] == ["0-printed.copying-lr-0.001-seed-0", "1-decay.text-lr-0.001-seed-1", "0-printed.text-lr-0.001-seed-1"]


def test_the_tables_that_come_with_the_tools(command):
    assert {"departures-1m", "departures-10m", "models-10m", "mqar", "table1"} <= set(tables.names())
    for name in tables.names():
        for quick in (False, True):
            table = tables.load(name, quick)
            for key, row in table.rows.items():
                if row.not_run or not (quick or row.overrides):  # large ones are searched for long
                    continue
                plan = tables.plan(table, key, 0, 1e-3, Path("out"), device="cpu")
                assert plan.validate().n_layers == row.overrides.get("n_layers", plan.model.config().n_layers)
                assert plan.steps < 10 or not quick
    assert "departures-1m" in command("experiment", "list")[1]


def test_tables_that_do_not_fit(small, refused, tmp_path):
    (small / "0-printed.yaml").write_text("label: printed\nrate: [1]\n")
    with pytest.raises(InputError, match=r"small/0-printed\.yaml\.rate: no such field; did you mean 'rates'"):
        tables.load(str(small))
    (small / "0-printed.yaml").write_text("label: printed\nseeds: []\n")
    with pytest.raises(InputError, match="give one at least of each"):
        tables.load(str(small))
    (small / "0-printed.yaml").write_text("label: printed\nrate_of: 9-none\n")
    with pytest.raises(InputError, match="name a row that has rates of its own"):
        tables.load(str(small))
    assert "did you mean 'departures-1m'" in refused("experiment", "departure-1m")
    assert "positive number of runs" in refused("experiment", "mqar", "--jobs", -1)
    for rows in ("x*", "00-*,x*"):
        assert "rows: 'x*' fits none that is run" in refused("experiment", "mqar", "--rows", rows, "--out", tmp_path)
    assert "takes the rate of 03-lat.language" in refused("experiment", "table1", "--rows", "03-lat.listops", "--out", tmp_path)
    assert "minutes: -1" in refused("experiment", "mqar", "--minutes", -1, "--out", tmp_path)
    assert "cannot be read" in refused("experiment", "mqar", "--draw", tmp_path / "nothing.json")
    made = {"table": "mqar", "page": {}, "quick": False, "about": {}}
    for part, found in enumerate(({"table": "mqar", "rows": []}, {**made, "rows": [{}]}, {**made, "rows": 3})):
        (tmp_path / f"{part}.json").write_text(json.dumps(found))
        assert "no results of" in refused("experiment", "mqar", "--out", tmp_path, "--join", f"[{tmp_path / f'{part}.json'}]")


def test_spread_shows_seeds():
    assert drawn.spread([2.0], 3) == "2.000"
    assert drawn.spread([2.0, 3.0], 2) == "2.50 (2.00–3.00)"


def test_curves_over_epochs_and_the_time_scales_of_a_run(command, text, tmp_path):
    folder = tmp_path / "epochs"
    folder.mkdir()
    (folder / "table.yaml").write_text(
        f"title: Epochs\nfigure: epochs\nrow:\n  model: infinityformer\n  overrides: {{d_model: 8, n_layers: 2, n_heads: 2, d_ffn: 8}}\n"
        f"  seeds: [0]\n  rates: [0.01]\n  train: {{epochs: 1, steps: 2, batch_size: 2, seq_len: 8, log_every: 1, "
        f"data: {{corpus: {text}, order: shuffled, limit: 400, eval_tokens: 64}}}}\n"
    )
    (folder / "0-only.yaml").write_text("label: only\n")
    assert command("experiment", folder, "--out", tmp_path)[0] == 0
    run = json.loads((tmp_path / "epochs.json").read_text())["rows"][0]["runs"][0]
    assert run["epochs"] == 1
    assert [at for at, _ in run["losses"]] == [16 * (i + 1) for i in range(run["steps"])]
    assert (tmp_path / "epochs.png").exists()

    trained = tmp_path / "epochs" / "0-only-lr-0.01-seed-0"
    found = scales.measure(trained, "cpu", 64)
    half = [[round(tokens, 3) for tokens in layer] for layer in found["start"]]
    assert half == [[round(math.log(0.5) / math.log(1 - forgotten), 3) for forgotten in (0.1, 0.01, 0.001)]] * 2
    assert found["end"] != found["start"]
    assert {round(sum(layer), 9) for layer in found["shares"]} == {1.0}
    config, params = load_params(model_file(trained))
    assert isinstance(config, InfinityFormerConfig)
    for reading in range(4):
        silent = [round(layer[reading], 12) for layer in scales.shares(config, scales.without(config, params, reading))]
        assert silent == [0, 0]
    assert len(set(found["lost"])) == 4
    assert "memory 3" in scales.markdown({"run": {}, **found})
