"""What JAX's benchmark times beside ours is the same op."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unisono_jax
from unisono_conformance import judge, numerics
from unisono_jax.ops import linear_attention, multiscale, selective_scan
from unisono_tools.bench import jax as bench
from unisono_tools.bench import jax_ops as ops
from unisono_tools.bench import jax_rows as rows

RESULTS = Path(__file__).parents[3] / "docs/results"


def test_peers_are_right():
    q, k, v, S, z = (a.astype(jnp.float32) for a in ops.attention_inputs((1, 128, 1, 4), 0))
    truth, _ = linear_attention.recurrent(q, k, v, (S, z))
    judge.same(np.asarray(ops.chunked_einsum(q, k, v)), np.asarray(truth), numerics.formula("float32", 128))
    given = tuple(a.astype(jnp.float32) for a in ops.scan_inputs((1, 16, 3, 2), 0))
    judge.same(np.asarray(ops.associative(*given)), np.asarray(selective_scan.recurrent(*given)[0]), numerics.formula("float32", 16))


def test_the_truth_is_of_the_first_head():
    given, do = ops.scales_inputs((2, 12, 2, 4, 3), 0), jnp.ones((2, 12, 2, 4), jnp.bfloat16)
    q, k, v, log_decay, weight, *state = given
    o, _ = multiscale.parallel(q, k, v, q, k, log_decay, weight, (state[0], state[1]), implementation="plain")
    truth = ops.exact("multiscale", given, do)
    judge.same(np.asarray(o)[:1, :, :1], truth[0].astype(np.float32), numerics.formula("float32", 12))
    assert [a.shape for a in truth] == [(1, 12, 1, 4)] * 4


def test_a_page():
    case = {"op": "selective_scan", "shape": [1, 2, 3, 4], "floor_ms": [1.0, 2.0]}
    errors = {"error_o": 1e-6, "error_gradient": 2e-6}
    row = {"contestant": "pallas", "forward_ms": 2.0, "forward_device_ms": 1.5, "both_ms": 6.0, **errors, "peak_bytes": 1 << 20}
    result = {
        "run": {"command": "bench"},
        "copy_bytes_per_s": 3e12,
        "ops": [{**case, "rows": [{**row, "compile_s": 1.0}, {"contestant": "peer", "note": "out of memory"}]}],
        "models": [{"model": "lat-base", "batch": 1, "length": 2, "implementation": "auto", "note": "out of memory"}],
        "decode": [{"model": "lat-base", "context": 1024, "us": 100.0, "traces": 1}],
    }
    page = bench.markdown(result)
    assert "| pallas | 2.000 | 1.500 | 50% | 6.000 | – | 50% | 1.0e-06 | 2.0e-06 | 1 | 1.0 |\n" in page
    assert "| lat-base | 1,024 | 100 | 1 |\n" in page


def test_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One contestant's row, and the rows of an op whose sources are others; with other versions nothing goes on."""
    small: dict[str, Any] = {"linear_attention": (1, 64, 1, 4), "diagonal_ssm": (1, 4, 2, 1)}
    table = {op: ops.OPS[op]._replace(shapes=(shape,)) for op, shape in small.items()}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench, "copy_rate", lambda: 1e9)
    asked: list[str] = []
    for module in (bench, rows):
        monkeypatch.setattr(module, "OPS", table)
        monkeypatch.setattr(module, "contestants", lambda op, shape: {"one": lambda *given: given[0], "two": lambda *given: 2 * given[0]})
    monkeypatch.setattr(rows, "device_ms", lambda calls: 0.5)
    monkeypatch.setattr(rows, "exact", lambda op, given, do: asked.append(op) or [np.ones((1, 1)) for _ in "ab"])
    argv = ["--parts", *small, "--repeats", "1", "--output", str(tmp_path / "page")]

    def kept() -> dict[str, list[Any]]:
        return {case["op"]: case["rows"] for case in json.loads((tmp_path / "page.json").read_text("utf-8"))["ops"]}

    assert bench.main(argv) == 0
    first = kept()
    assert {op: [row["contestant"] for row in each] for op, each in first.items()} == {op: ["one", "two"] for op in small}
    old = json.loads((tmp_path / "page.json").read_text("utf-8"))
    del old["ops"][0]["rows"][1]
    old["ops"][1]["sources"] = "others"
    (tmp_path / "page.json").write_text(json.dumps(old), "utf-8")
    assert bench.main([*argv, "--resume"]) == 0
    assert kept()["linear_attention"][0] == first["linear_attention"][0]
    assert kept().keys() == small.keys()
    assert [len(each) for each in kept().values()] == [2, 2]
    assert kept()["diagonal_ssm"] != first["diagonal_ssm"]
    asked.clear()
    assert bench.main([*argv, "--resume"]) == 0
    assert not asked
    late = json.loads((tmp_path / "page.json").read_text("utf-8"))
    late["ops"][0]["rows"][1] = {"contestant": "two", "note": f"{bench.LATE[0]} 9 s"}
    (tmp_path / "page.json").write_text(json.dumps(late), "utf-8")
    assert bench.main([*argv, "--resume", "--patience", "0"]) == 0
    assert [row["contestant"] for row in kept()["linear_attention"] if "both_ms" in row] == ["one", "two"]
    assert asked == ["linear_attention"]
    old["run"]["versions"] = "jax 0.1"
    (tmp_path / "page.json").write_text(json.dumps(old), "utf-8")
    with pytest.raises(SystemExit, match=r"--resume: versions is .* there jax 0\.1; begin a new file"):
        bench.main([*argv, "--resume"])


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    (tmp_path / "file").touch()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench, "copy_rate", None)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--output", str(tmp_path / "file" / "page")])
    assert "cannot be written, for" in capsys.readouterr().err


def test_figures_are_of_all_files_that_an_op_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "room"
    files = {
        "ops/scan": "from room.ops.carry import carried\n\n\ndef run():\n    from room.kernels import scan\n",
        "ops/carry": "",
        "kernels/scan": "from room.kernels import operator as made\n",
        "kernels/operator": "import room.registry\nfrom room.kernels import name\n",
        "kernels/__init__": "name = 1\n",
        "registry": "",
        "ops/gru": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.setattr(unisono_jax, "__path__", [str(folder)])
    before, every = bench.sources("scan"), bench.sources()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text + "\n", "utf-8")
        assert (bench.sources("scan") == before) == (name == "ops/gru")
        assert bench.sources() != every
        (folder / f"{name}.py").write_text(text, "utf-8")


@pytest.mark.parametrize("numbers", sorted(RESULTS.glob("kernels-jax-*.json")), ids=lambda path: path.stem)
def test_the_page_is_its_numbers(numbers: Path):
    assert bench.markdown(json.loads(numbers.read_text("utf-8"))) == numbers.with_suffix(".md").read_text("utf-8")


@pytest.mark.parametrize("number", [0, -1])
def test_rows_at_once_are_one_or_more(capsys: pytest.CaptureFixture[str], number: int) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main([f"--at-once={number}"])
    assert f"--at-once {number}: give 1 or more" in capsys.readouterr().err
