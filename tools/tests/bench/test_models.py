"""What the benchmark of whole models counts and shows, and what the tuner tries; both run on a GPU."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import pathlib
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
import unisono_torch
from unisono_conformance import judge, numerics
from unisono_spec.contract import count_params, preset
from unisono_tools.bench import head, lat, lengths, measure, models, tune, workers
from unisono_tools.experiments.match import nearest
from unisono_torch.kernels.linear_attention import table as linear_table
from unisono_torch.kernels.multiscale import table


def test_sizes_have_models_of_heads_of_64():
    for size in models.SIZES:
        for name in models.MODELS:
            config: Any = nearest(name, size, models.VOCABULARY)
            assert f"{count_params(config) / size:.2f}" == "1.00"
            assert config.head_width == 64


@pytest.mark.parametrize("head", [None, "alike", "tied", "own"])
def test_models_whose_heads_are_alike_compute_alike(head: str | None):
    """Within 7 %; as presets have them, InfinityFormer's takes half as many operations more than the Transformer's."""
    for size in models.SIZES:
        counts = [models.operations(nearest(name, size, models.VOCABULARY, head)) for name in models.MODELS]
        assert max(counts) < 1.07 * min(counts)
    usual = [models.operations(nearest(name, models.SIZES[0], models.VOCABULARY, "usual")) for name in models.MODELS]
    assert max(usual) > 1.5 * min(usual)


def test_heads_are_told_apart_where_models_differ():
    small, large = (models._told_apart(size, ["alike", "tied", "own", "usual"]) for size in models.SIZES)
    assert small == ["alike", "tied", "usual"]
    assert large == ["alike", "own"]


def test_operations_leave_out_what_is_looked_up():
    untied = preset("lat-1m")
    assert models.operations(untied) == 6 * (count_params(untied) - untied.vocab_size * untied.d_model)
    tied = untied.replace(tie_head=True)
    assert models.operations(tied) == 6 * count_params(tied)


def test_a_step_learns():
    """By the loss of logits and by that of the model, which are one loss."""
    tokens, firsts = torch.zeros(2, 9, dtype=torch.long), []
    for logits in (False, True):
        step = models.trainer(preset("transformer-1m").replace(n_layers=1), "cpu", False, logits)
        losses = [float(step(tokens)) for _ in range(8)]
        assert losses[-1] < losses[0]
        firsts.append(losses[0])
    judge.same(np.array(firsts[:1]), np.array(firsts[1:]), limit=numerics.rounding("float32", 2**4))


def test_nothing_else_is_compiled_or_timed_beside_steps_and_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys):
    lock, seen = str(tmp_path / "lock"), list[str]()

    def allowed(how: int) -> bool:
        with pathlib.Path(lock).open("w") as other:
            try:
                fcntl.flock(other, how | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def look() -> None:
        seen.append("free" if allowed(fcntl.LOCK_EX) else "beside" if allowed(fcntl.LOCK_SH) else "alone")

    class Model:
        def generate(self, prompt: np.ndarray, _: int) -> None:
            look()

    def step(_: torch.Tensor) -> torch.Tensor:
        look()
        return torch.zeros(())

    monkeypatch.setattr(unisono_torch, "create", lambda *_, **__: Model())
    monkeypatch.setattr(models, "trainer", lambda *_: step)
    models.prompted("lat", models.SIZES[0], [2048], lock)
    models.trained("lat", models.SIZES[0], [8], 16, False, 1, lock)
    assert seen == ["beside", "alone", "beside", "beside", "alone"]
    assert [json.loads(line).get("prompt") for line in capsys.readouterr().out.splitlines()] == [2048, None]


def test_who_waits_to_time_goes_before_who_compiles_next(tmp_path: pathlib.Path):
    lock, order = str(tmp_path / "lock"), list[str]()

    def hold(name: str, how: int) -> None:
        with measure.held(lock, how):
            order.append(name)

    with measure.held(lock, fcntl.LOCK_SH):
        beside = threading.Thread(target=hold, args=("compiles", fcntl.LOCK_SH))
        beside.start()
        beside.join()
        alone = threading.Thread(target=hold, args=("times", fcntl.LOCK_EX))
        alone.start()
        with pathlib.Path(f"{lock}.turn").open("w") as turn:
            while True:  # until it has its turn, for which it waits no longer than for us
                try:
                    fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    break
                fcntl.flock(turn, fcntl.LOCK_UN)
        late = threading.Thread(target=hold, args=("compiles next", fcntl.LOCK_SH))
        late.start()
        late.join(0.2)
        assert order == ["compiles"]
    alone.join()
    late.join()
    assert order == ["compiles", "times", "compiles next"]


def test_head_and_loss_are_measured_against_float64():
    shape, failed = (6, 8, 20), {"other": "out of memory"}
    case = {"shape": shape, "rows": [{"contestant": "kept", **head.measured(head.kept, shape, "cpu", 1)}], "failed": failed}
    wrong = case["rows"][0]["errors"]
    assert all(0 < error < numerics.LIMIT for error in wrong.values())
    text = head.markdown({"run": {"command": "x"}, "ceilings": {"matmul_flop_per_s": 1e9}, "cases": [case]})
    assert f"| 6 × 8 by 20 | kept | {case['rows'][0]['forward_ms']:.2f} |" in text
    assert "| 6 × 8 by 20 | other | – | – | – | – | out of memory | | | |" in text


def test_tables_compare_with_the_transformer(tmp_path):
    rows = [
        {"model": name, "size": 10**6, "parameters": 10**6, "length": length, "batch": 1, "compiled": True, "tokens_per_s": rate,
         "operations": 6 * 10**6, "peak_bytes": 2**30}
        for name, rates in (("lat", (150.0, 150.0)), ("transformer", (100.0, 50.0))) for length, rate in zip((8, 64), rates, strict=True)
    ]  # fmt: skip
    prompts = [{"model": "lat", "size": 10**6, "prompt": 1000, "seconds": 1.0, "peak_bytes": 2**20}]
    result = {"run": {"command": "x"}, "ceilings": {"matmul_flop_per_s": 6e9}, "training": rows, "prompts": prompts}
    text = models.markdown(result)
    assert "| 8 | lat | 150 | 1.50 | 15.0% | 1.0 |" in text
    assert "| 64 | lat | 150 | 3.00 | 15.0% | 1.0 |" in text
    assert "| lat | 1M | 1,000 | 1.0 | 1 |" in text
    tied = [{**row, "head": "tied", "tokens_per_s": 2 * row["tokens_per_s"] if row["model"] == "lat" else 50.0} for row in rows]
    both = models.markdown({**result, "training": rows + tied})
    assert both.startswith(text[: text.index("## Prompts")].rstrip())
    assert "## 1M parameters, one table for embedding and head, compiled" in both
    assert "| 8 | lat | 300 | 6.00 | 30.0% | 1.0 |" in both
    kept = {**rows[0], "logits": True, "tokens_per_s": 120.0, "peak_bytes": 2**31}
    with_logits = models.markdown({**result, "training": [*rows, kept]})
    assert "| lat, 1M | 8 | 120 | 150 | 1.25 | 2.0 | 1.0 |" in with_logits
    assert "| 8 | lat | 120 |" not in with_logits
    assert "logits" not in text
    models.plot(tmp_path / "plot.png", rows)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_tuner_tries_of_one_decay():
    options = argparse.Namespace(op="multiscale", hopper=True, scales=1, feature_map="elu1", way="backward")
    tried = [table.SweepCut(**cut) for cut in tune.candidates(tune.fields(options), 64, {})]
    assert {(cut.chunk, cut.warps) for cut in tried} == {(64, 4), (128, 8)}
    options.scales = 4
    assert tune.fields(options) == tune.FIELDS["multiscale on Hopper"]


@pytest.mark.parametrize(("way", "width"), linear_table.HOPPER)
def test_what_stands_for_hopper_is_among_what_the_tuner_tries(way, width):
    options = argparse.Namespace(op="linear_attention", hopper=True, feature_map="elu1", way=way)
    tried = [linear_table.HopperCut(**cut) for cut in tune.candidates(tune.fields(options), width, {})]
    assert linear_table.HOPPER[way, width] in tried


def test_what_the_tuner_tries():
    tried = list(tune.candidates(tune.FIELDS["linear_attention"], 64, {}))
    assert {cut["block"] for cut in tried} == {32, 64}
    assert list(tune.candidates(tune.FIELDS["multiscale"], 64, {"chunk": [64], "columns": [64], "warps": [4], "registers": [168]})) == [
        {"chunk": 64, "blocks": 2, "columns": 64, "warps": 4, "state_warps": 4, "stages": 2, "registers": 168}
    ]


@pytest.mark.parametrize("eager", [True, False])
def test_a_page_links_the_picture_that_is_drawn(monkeypatch, tmp_path, eager):
    def process(command, **_):
        row = {
            "model": command[command.index("--models", command.index("--one")) + 1], "size": models.SIZES[0], "head": "usual", "length": 8,
            "compiled": not eager, "tokens_per_s": 1.0, "operations": 1e6, "peak_bytes": None, "losses": [],
        }  # fmt: skip
        return contextlib.nullcontext(types.SimpleNamespace(stdout=[json.dumps(row)]))

    monkeypatch.setattr("subprocess.Popen", process)
    monkeypatch.setattr(models, "ceilings", lambda _: {"matmul_flop_per_s": 1e12})
    monkeypatch.setattr(models, "plot", lambda path, _: path.touch())
    words = ["--models", "lat", "--sizes", str(models.SIZES[0]), "--prompts", "--output", str(tmp_path / "page")]
    assert models.main([*words, "--eager"] if eager else words) == 0
    assert ("(page.png)" in (tmp_path / "page.md").read_text("utf-8")) == (tmp_path / "page.png").exists() == (not eager)


def test_exponents_are_those_of_powers():
    """From FITTED tokens on alone; a kind with one point there has none."""
    rows = [
        {"model": "a", "kind": "training", "length": n, "seconds": 1e-3 if n < 1 << 14 else 1e-9 * n**1.5, "peak": 3.0 * n}
        for n in (1 << 10, 1 << 14, 1 << 15, 1 << 16)
    ]
    rows.append({"model": "a", "kind": "reading", "length": 1 << 16, "seconds": 1.0, "peak": 1.0})
    found = lengths.exponents([*rows, {"model": "a", "kind": "reading", "length": 1 << 17, "ended": "out of memory"}])
    assert list(found["a"]) == ["training"]
    judge.same(np.array([found["a"]["training"][what] for what in ("seconds", "peak")]), np.array([1.5, 1.0]),
               limit=numerics.rounding("float64", 2**10))  # fmt: skip
    page = lengths.markdown({"run": {}, "rows": [*rows, {"model": "a", "kind": "reading", "length": 1 << 17, "ended": "out of memory"}]})
    assert "| a | 1.50 | 1.00 | – | – |" in page
    assert "not run: out of memory" in page


def test_a_model_that_does_not_run_costs_its_own_rows_alone(monkeypatch, tmp_path, capsys):
    """And --resume measures it and what is missing, no other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA none")
    monkeypatch.setattr(lengths, "plot", lambda *_: None)
    asked, ends = list[str](), {"lat": "its process ended"}

    def rows(_, tasks, patience):
        for task in tasks:
            asked.append(task[0])
            point = {"model": task[0], "kind": "training", "length": 1024, "seconds": float(len(asked)), "peak": 1.0}
            yield task, ends.get(task[0], [point])

    monkeypatch.setattr(workers, "rows", rows)
    chosen = ["--output", str(tmp_path / "some"), "--models"]
    assert lengths.main([*chosen, "transformer", "lat"]) == 0
    assert "| lat | not run: its process ended |" in (tmp_path / "some.md").read_text("utf-8")
    ends.clear()
    assert lengths.main([*chosen, "transformer", "cram-plus", "lat", "--resume"]) == 0
    found = json.loads((tmp_path / "some.json").read_text("utf-8"))
    assert asked == ["transformer", "lat", "cram-plus", "lat"]
    assert [(row["model"], row["seconds"]) for row in found["rows"]] == [("cram-plus", 3.0), ("lat", 4.0), ("transformer", 1.0)]
    assert found["run"]["device"] == "NVIDIA none"
    with pytest.raises(SystemExit):
        lengths.main(["--resume"])
    assert "name it by --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "length", "why"),
    [
        (torch.OutOfMemoryError("1 GiB"), 4096, "out of memory"),
        (RuntimeError("unspecified launch failure\nmore"), 4096, "unspecified launch failure"),
        ((2 * lengths.PATIENCE, 1.0), 8192, f"a call of 4,096 tokens takes {2 * lengths.PATIENCE:.1f} s"),
    ],
)
def test_what_ends_training_leaves_what_came_before_it_and_reading(monkeypatch, outcome, length, why):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(unisono_torch, "create", lambda *_, **__: torch.nn.Linear(1, 1))
    monkeypatch.setattr(lengths, "_tokens", lambda length: torch.zeros(length, 1))
    ready = []

    def timed(call, tokens, _):
        assert ready == [True]
        if call.__name__ != "train" or len(tokens) != 4096:
            return 0.1, 1.0
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(lengths, "_timed", timed)
    found = lengths.contest("lat", 3, lambda: ready.append(True))
    assert [(row["kind"], row["length"], row["ended"]) for row in found if "ended" in row] == [("training", length, why)]
    assert [row["length"] for row in found if row["kind"] == "training" and "seconds" in row][:2] == [1024, 2048]
    assert found[-1]["length"] == lengths.LONGEST["reading"]


def test_lat_is_timed_with_each_number_of_threads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lat, "CONFIG", preset("lat-1m", d_model=16, n_layers=1, head_width=8, qk_width=8))
    monkeypatch.setattr(lat, "LENGTHS", (32, 64))
    assert lat.main(["--peak", "1", "32"]) == 0
    held = int(capsys.readouterr().out)
    assert held > 1 << 20
    monkeypatch.setattr(lat, "_grown", lambda batch, length, dtype: held + 4 * length * batch)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert lat.main(["--threads", "1", "2", "--dtypes", "float32", "--repeats", "1", "--output", str(tmp_path / "lat")]) == 0
    assert chosen == [1, 2]
    content = json.loads((tmp_path / "lat.json").read_text())
    assert [row["what"].split()[0] for row in content["rows"]] == [*2 * ["reading", "training", "generating"], "a", "the"]
    assert all(row["tokens_a_second"] > 0 for row in content["rows"][:6])
    # a position; S [2, 8, 8] and z [2, 8] of one layer
    assert [row["bytes"] for row in content["rows"][6:]] == [4 * 32, 4 * (1 + 2 * 8 * 8 + 2 * 8)]
    assert (tmp_path / "lat.md").read_text() == lat.markdown(content)
