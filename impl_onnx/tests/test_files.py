"""The exported file: what it holds, that it needs neither torch nor this package, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from unisono_onnx import builder, export, writing
from unisono_onnx.check import example
from unisono_spec.contract import DTYPES, InputError, config_from_dict

from .graphs import CONFIGS, check, graph, params

READ_ALONE = """
import json, sys
sys.modules["unisono_onnx"] = sys.modules["unisono_spec"] = None  # importing one would fail
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
config = json.loads(session.get_modelmeta().custom_metadata_map["unisono.config"])
outputs = session.run(None, dict(np.load(sys.argv[2])))
np.savez(sys.argv[3], **{value.name: array for value, array in zip(session.get_outputs(), outputs)})
print(config["arch"])
"""


def test_file_is_read_by_onnxruntime_and_numpy_alone(tmp_path: Path) -> None:
    inputs = example(CONFIGS["adaptive"], 2, 70)
    np.savez(tmp_path / "in.npz", allow_pickle=False, **inputs)
    command = [sys.executable, "-c", READ_ALONE, graph("adaptive"), tmp_path / "in.npz", tmp_path / "out.npz"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["cram"]
    check("adaptive", inputs, dict(np.load(tmp_path / "out.npz")))


def write(name: str, path: Path, metadata: dict[str, str] | None = None, **options: str) -> None:
    export(CONFIGS[name], params(name), path, metadata, **options)


def test_metadata_holds_the_config_and_what_is_given(tmp_path: Path) -> None:
    write("binary", tmp_path / "a.onnx", {"unisono.tokenizer": "bytes"})
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert config_from_dict(json.loads(metadata["unisono.config"])) == CONFIGS["binary"]
    assert metadata["unisono.tokenizer"] == "bytes"
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_weights_that_do_not_fit_go_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_EMBEDDED_BYTES", 0)
    write("binary", tmp_path / "a.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_parameters_of_another_dtype_are_computed_with_in_float32(dtype: str, tmp_path: Path) -> None:
    held = {name: p.astype(DTYPES[dtype]) for name, p in params("adaptive").items()}
    export(CONFIGS["adaptive"], held, tmp_path / "a.onnx")
    types = {initializer.data_type for initializer in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_parameters_of_another_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input\.weight"):
        export(CONFIGS["binary"], params("adaptive"), tmp_path / "a.onnx")
    assert not any(tmp_path.iterdir())


def test_names_are_unicode(tmp_path: Path) -> None:
    """A file's name may be any bytes, which Python holds as halves of surrogate pairs; ONNX's are UTF-8."""
    for name, metadata in (("\udcff.onnx", {}), ("a.onnx", {"unisono.tokenizer": "\udcff"})):
        with pytest.raises(InputError, match="is no Unicode text"):
            write("binary", tmp_path / name, metadata)
    assert not any(tmp_path.iterdir())


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds what no file's name can"):
        write("binary", tmp_path / "a\0.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("changed", [{"config": None}, {"path": 3}, {"metadata": ["a"]}, {"params": None}])
def test_arguments_of_another_kind(changed: dict[str, Any], tmp_path: Path) -> None:
    given = {"config": CONFIGS["binary"], "params": params("binary"), "path": tmp_path / "a.onnx"}
    with pytest.raises(InputError, match=f"{next(iter(changed))}: .*; give"):
        export(**{**given, **changed})


def test_metadata_must_be_strings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"json\.dumps"):
        write("binary", tmp_path / "a.onnx", {"vocabulary": [1]})  # pyright: ignore[reportArgumentType]


def test_graph_that_disagrees_is_not_written_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.onnx").write_bytes(b"old")
    whole = builder.definitions()

    def lost() -> list[onnx.FunctionProto]:
        """Without what the state before a chunk adds."""
        protos = [onnx.FunctionProto.FromString(proto.SerializeToString()) for proto in whole]
        for node in next(proto for proto in protos if proto.name == "DecayedSum").node:
            for body in (attribute.g for attribute in node.attribute if attribute.name == "body"):
                add = next(inner for inner in body.node if inner.op_type == "Add")
                add.input[1] = add.input[0]
        return protos

    monkeypatch.setattr(builder, "definitions", lost)
    with pytest.raises(InputError, match="disagree at B="):
        write("binary", tmp_path / "a.onnx")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.onnx", b"old")]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        write("binary", tmp_path / "file" / "a.onnx")


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".a.onnx.0123abcd.part"
    left.mkdir()
    (left / "a.onnx").write_bytes(b"half")
    write("binary", tmp_path / "a.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_threads_export_at_once(tmp_path: Path) -> None:
    names = ("binary", "adaptive")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: write(name, tmp_path / f"{name}.onnx"), names))
    for name in names:
        onnx.checker.check_model(tmp_path / f"{name}.onnx", full_check=True)
        assert (tmp_path / f"{name}.onnx").read_bytes() == graph(name).read_bytes()


@pytest.mark.parametrize("key", ["config", "architecture", "contract", "version", "target", "precision"])
def test_what_a_graph_says_of_itself_is_its_own(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match="is the graph's own"):
        write("binary", tmp_path / "a.onnx", {f"unisono.{key}": "{}"})
    found = {entry.key: entry.value for entry in onnx.load(graph("binary")).metadata_props}
    assert f"unisono.{key}" in found
    assert (found["unisono.architecture"], found["unisono.target"], found["unisono.precision"]) == ("cram", "portable", "float32")


def test_older_weights_do_not_stay_beside_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writing, "MAX_EMBEDDED_BYTES", 0)
        write("binary", tmp_path / "a.onnx")
    (tmp_path / "b.onnx.data").write_bytes(b"another's")
    write("binary", tmp_path / "a.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "b.onnx.data"]


@pytest.mark.parametrize("name", ["a", "a.bin", "a.onnx.data", "a.ONNX"])
def test_a_graph_s_name_ends_in_onnx(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"let it end in \.onnx"):
        write("binary", tmp_path / name)
    assert not any(tmp_path.iterdir())
