"""Runs of a table, and of a comparison, in processes of their own."""

from __future__ import annotations

import json

from rich.console import Console
from unisono_tools import cli
from unisono_tools.backends import backend
from unisono_tools.config import default_backend
from unisono_tools.experiments import compare, running, tables
from unisono_tools.experiments.match import FAMILIES, match
from unisono_tools.experiments.worker import RESULT


def test_a_process_does_many_runs_and_another_follows_one_that_failed(tmp_path, text):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "table.yaml").write_text(
        "title: Small\nfigure: none\nrow:\n  model: cram (adaptive)\n  overrides: {d_model: 8, n_layers: 1}\n  rates: [0.001]\n"
        f"  train: {{steps: 2, batch_size: 2, seq_len: 8, data: {{corpus: {text}, eval_tokens: 64}}}}\n"
    )
    (folder / "0-wrong.yaml").write_text("label: fails\nseeds: [0]\ntrain: {data: {corpus: nothing-like-it}}\n")
    (folder / "1-right.yaml").write_text("label: does not\nseeds: [0, 1, 2]\n")
    path = running.run(tables.load(str(folder)), tmp_path / "out", "here", 2, 0.0, Console(quiet=True))
    rows = {row["row"]: row["runs"] for row in json.loads(path.read_text())["rows"]}
    assert [run["status"].split(":")[0] for run in rows["0-wrong"]] == ["failed"]
    assert [run["status"] for run in rows["1-right"]] == ["done"] * 3
    assert len({run["score"] for run in rows["1-right"]}) == 3
    # memory is told where it is of one run alone: of the first of a process, or where the device forgets
    told = sum(run["peak_bytes"] is not None for run in rows["1-right"])
    assert told == 3 if backend(default_backend()).forget_peak() else 1 <= told < 3


def test_models_are_compared_by_several_processes_as_by_one(tmp_path, text, monkeypatch):
    monkeypatch.setattr(compare, "match", lambda params, vocab: match(100_000, vocab))
    monkeypatch.setattr("unisono_tools.experiments.match.FAMILIES", {"cram (fixed)": FAMILIES["cram (fixed)"]})
    argv = ["compare", "--corpus", str(text), "--steps", "2", "--batch_size", "2", "--seq_len", "16", "--backend", "torch", "--seeds", "2"]
    found = []
    for jobs, done in ("1", 0), ("2", 2):
        out = tmp_path / jobs
        assert cli.main([*argv, "--jobs", jobs, "--out", str(out)]) == 0
        assert len(list(out.glob(f"*/{RESULT}"))) == done
        (curve,) = json.loads((out / "compare.json").read_text())["curves"]
        found.append({name: value for name, value in curve.items() if name != "speed"})
    assert found[0] == found[1]
