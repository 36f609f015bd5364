"""The benchmark of linear and multi-scale attention runs without a GPU, and what it times is right."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import operator
import os
import sys
import threading
import time
import types
from typing import Any

import pytest
import torch
from unisono_conformance import numerics
from unisono_tools.bench import contests, marks, measure, recurrences, workers
from unisono_tools.bench.attention import ELEMENTS, SUITES, drawn, main, markdown
from unisono_tools.bench.contests import OURS, SDPA, Case, contest, names


def test_a_run_on_a_cpu(tmp_path, capsys):
    assert main(["--repeats", "1", "--output", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert [len(case["rows"]) for case in result["cases"]] == [2, 1, 2]
    for case in result["cases"]:
        for row in case["rows"]:
            assert row["forward_ms"] > 0
            assert row["error_o"] < numerics.formula("float32", case["length"])
            assert row["error_gradient"] < numerics.formula("float32", case["length"], gradient=True)
    text = (tmp_path / "run.md").read_text(encoding="utf-8")
    assert text.count("| plain |") == text.count("| unisono | ") == 2
    assert "| shape | floor | unisono, graph | unisono, eager | unisono, errors |\n" in text
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "plain" in capsys.readouterr().out
    lost, changed = result["cases"][0]["rows"].pop(), result["cases"][1]
    changed["kernels"], changed["rows"][0]["forward_ms"] = "others", -1
    (tmp_path / "run.json").write_text(json.dumps(result), encoding="utf-8")
    assert main(["--repeats", "1", "--together", "2", "--resume", "--output", str(tmp_path / "run")]) == 0
    again = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert again["cases"][0]["rows"][0] == result["cases"][0]["rows"][0]  # as it was
    assert again["cases"][0]["rows"][1]["contestant"] == lost["contestant"]
    assert again["cases"][1]["rows"][0]["forward_ms"] > 0
    with pytest.raises(SystemExit, match=r"has command .* --repeats 1, here .* --repeats 2"):
        main(["--repeats", "2", "--resume", "--output", str(tmp_path / "run")])
    again["run"]["versions"] = "others"
    (tmp_path / "run.json").write_text(json.dumps(again), encoding="utf-8")
    with pytest.raises(SystemExit, match="has versions others"):
        main(["--repeats", "1", "--resume", "--output", str(tmp_path / "run")])
    assert "as CUPTI records them" in text
    del result["told"]
    (tmp_path / "run.json").write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(SystemExit, match="was timed in another way"):
        main(["--repeats", "1", "--resume", "--output", str(tmp_path / "run")])
    assert "by the host's clock" in markdown(result)


def test_contestants_take_turns_in_processes_of_their_own():
    calls, fails = operator.methodcaller("__call__"), operator.methodcaller("nothing")
    (_, first), (_, second), (_, third) = workers.rows(operator.call, [(calls,), (fails,), (calls,)], 60)
    assert (first, third) == (None, None)  # what a turn returns
    assert "has no attribute 'nothing'" in second


def test_threads_take_turns_when_all_of_a_group_are_ready():
    came, answer = [], operator.methodcaller("__call__")

    def contest(name: str, turn: workers.Turn) -> str:
        came.append(f"{name} ready")
        turn()
        came.append(f"{name} timed")
        return answer({"c": lambda: int(name)}.get(name, lambda: name))

    assert [said for _, said in workers.side_by_side(contest, [("a",), ("b",), ("c",)], 2)][:2] == ["a", "b"]
    assert sorted(came[:2]) == ["a ready", "b ready"]
    assert came[2:] == ["a timed", "b timed", "c ready", "c timed"]
    (_, said) = next(workers.side_by_side(contest, [("c",)], 2))
    assert said == "ValueError: invalid literal for int() with base 10: 'c'"


def test_a_thread_that_ends_itself_holds_nobody_up():
    quits, found = functools.partial(sys.exit, 3), []
    group = workers.side_by_side(lambda call, turn: call(), [(quits,), (lambda: 1,)], 2)
    waiting = threading.Thread(target=lambda: found.extend(said for _, said in group), daemon=True)
    waiting.start()
    waiting.join(20)
    assert found == ["SystemExit: 3", 1]


def test_what_is_not_ready_is_ended_before_others_are_timed(monkeypatch):
    least: Any = min  # calls its key with its first argument, then with the turn
    slow, ends = functools.partial(least, 60, key=time.sleep), functools.partial(least, 3, key=os._exit)
    answer, said = workers._answer, iter(["not ready"])
    monkeypatch.setattr(workers, "_answer", lambda mine, seconds: next(said, None) or answer(mine, seconds))
    found, alive = [], []
    calls = operator.methodcaller("__call__")
    for _, row in workers.rows(operator.call, [(slow,), (ends,), (calls,), (calls,), (calls,)], 60, at_once=3):
        found.append(row)
        alive.append(len(multiprocessing.active_children()))
    assert found == ["not ready", "its process ended", None, None, None]
    assert max(alive[0], alive[2]) <= 1  # the third: those after it have not begun


def test_what_a_call_of_several_kernels_takes():
    assert measure.per_call([1.0, 2.0, 1.0, 5.0, 1.0, 3.0], 3) == 4.0
    for times in ([1.0, 2.0], []):
        with pytest.raises(RuntimeError, match=f"got {len(times)} of 3 calls"):
            measure.per_call(times, 3)


def test_what_is_one_value_throughout_is_made_once():
    given = 0.0, (2, 3), torch.float32, torch.device("cpu")
    assert contests.filled(*given) is contests.filled(*given)
    assert not contests.filled(*given).any()


def test_softmax_attention_and_retention_are_held_to_float64():
    softmax = contest(Case(1, 40, 2, 16, "float32"), SDPA, "cpu", 1, lambda: None)
    one = contest(Case(1, 40, 2, 16, "float32", scales=1), OURS, "cpu", 1, lambda: None)
    for row in (softmax, one):
        assert row.error_o is not None
        assert row.error_o < numerics.formula("float32", 40)
        assert row.error_gradient is not None
        assert row.error_gradient < numerics.formula("float32", 40, gradient=True)


def test_the_recurrence_of_peers():
    q, k, v = (torch.rand(1, 10, 2, 3, dtype=torch.float64) for _ in range(3))
    S, one_by_one = torch.zeros(1, 2, 3, 3, dtype=torch.float64), []
    for t in range(10):
        S = S * torch.e**-0.25 + k[:, t, :, :, None] * v[:, t, :, None]
        one_by_one.append((q[:, t, :, None] @ S)[:, :, 0])
    difference = recurrences.exact(q, k, v, -0.25, chunk=4) - torch.stack(one_by_one, 1)
    assert float(difference.norm() / S.norm()) < numerics.formula("float64", 10)


def test_peers_by_case(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in ("fla", "jla", "torch"))
    found = {case.name: names(case, "cuda") for case in SUITES["attention"]}
    assert all(rows[0] == OURS for rows in found.values())
    assert [sum(row.startswith("fla") for row in rows) for rows in found.values()] == [2, 2, 2, 2, 0, 2, 2]
    assert [sum(row.startswith("jax") for row in rows) for rows in found.values()] == [1, 1, 1, 1, 1, 0, 1]
    assert names(SUITES["lengths"][0], "cuda") == [OURS, SDPA]


def test_what_is_met():
    most, least = (marks.Mark("", "", 1.1, 1.25, 1.0, least, "") for least in (False, True))
    assert [most.met(bound) for bound in (most.must, most.aim, None)] == ["yes", "**no**", "–"]
    assert [least.met(bound) for bound in (least.must, least.aim)] == ["**no**", "yes"]
    case = SUITES["attention"][0]
    inputs = 4 * case.array_bytes()[0]
    assert marks.memory({"held_bytes": case.held_bytes()}, {"peak_bytes": inputs}) == 1.0


def test_marks_of_what_there_is(tmp_path):
    shape = {"name": "B8 T4096 H16 K=V=64, one decay, bfloat16", "scales": 1, "feature_map": "elu1", "held_bytes": 100}
    ours = {"contestant": OURS, "forward_ms": 2.0, "both_ms": 3.0, "peak_bytes": 60}
    peer = {"contestant": "jax-linear-attention, no normaliser", "forward_ms": 1.0, "both_ms": 3.0, "peak_bytes": None}
    alone = {"name": "B8 T1024 H16 K=V=64, bfloat16", "scales": 0, "feature_map": "elu1", "held_bytes": 100, "rows": [ours]}
    content = {"run": {"device": "a GPU", "date": "today"}, "cases": [shape | {"rows": [ours, peer]}, alone]}
    (tmp_path / "kernels-attention-h100.json").write_text(json.dumps(content), encoding="utf-8")
    assert marks.main(tmp_path) == [tmp_path / "kernels-attention-marks-h100.md"]
    rows = [line for line in (tmp_path / "kernels-attention-marks-h100.md").read_text("utf-8").splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[4:7] for row in rows] == [
        ["2.00", "**no**", "**no**"], ["1.00", "yes", "yes"], ["1.10", "yes", "–"], ["1.10", "yes", "–"],
    ]  # fmt: skip
    content["cases"][0]["rows"][0] |= {"kernels_forward_ms": 1.2, "kernels_both_ms": 2.7}
    by_kernels = marks.markdown("h100", content, None)
    assert "| 1.20 | yes | **no** | 1.200 for 1.000 ms; 2.000 by events |" in by_kernels
    assert "| 0.90 | yes | yes | 2.700 for 3.000 ms; 3.000 by events |" in by_kernels


def test_floors_count_each_byte_once():
    elements = 8 * 4096 * 16 * 64
    assert SUITES["attention"][0].floor_bytes() == (8 * elements, 14 * elements)


def test_shapes_drawn_by_a_seed():
    assert drawn(1) == drawn(1) != drawn(2)
    some = [case for seed in range(40) for case in drawn(seed)]
    assert {case.scales for case in some} == {0, 1, 2, 3, 4, 5}
    for case in some:
        most = 16 if case.feature_map == "taylor2" else 128 if case.scales else 256
        assert 4 <= case.width <= most
        assert 16 <= case.values <= max(most, 256 if not case.scales else 128)
        assert case.batch == 1 or case.batch * case.length * case.heads * max(case.width, case.values) <= ELEMENTS
    assert any(case.width & (case.width - 1) for case in some)


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_was_tuned_before_is_not_compiled_again(monkeypatch, on_disk):
    seen: list[Any] = []

    class Autotuner:
        """As far as Triton's is called."""

        cache_results = True
        fn = types.SimpleNamespace(run=lambda *_, **given: seen.append(given))

        def __init__(self) -> None:
            self.nargs = {"x": 1}

        def prune_configs(self, kwargs):
            return [types.SimpleNamespace(all_kwargs=lambda size=size: {"BK": size}) for size in (32, 64)]

        def check_disk_cache(self, tuning_key, configs, bench_fn):
            return on_disk or bench_fn()

    for name, held in (
        ("_async_compile", {"AsyncCompileMode": lambda *_, **__: contextlib.nullcontext()}),
        ("autotuner", {"Autotuner": Autotuner}),
    ):
        monkeypatch.setitem(sys.modules, f"triton.runtime.{name}", types.SimpleNamespace(**held))
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    workers.compile_at_once()
    tuner = Autotuner()
    tried = tuner.prune_configs({"T": 4})
    assert not seen
    tuner.check_disk_cache((64,), tried, lambda: seen.append("timed"))
    compiled = [{"T": 4, "BK": size, "warmup": True} for size in (32, 64)]
    assert seen == ([] if on_disk else [*compiled, "timed"])
