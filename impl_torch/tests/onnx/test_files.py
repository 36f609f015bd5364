"""The exported file: what it holds, that it needs neither torch nor this package, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import unisono_torch
from unisono_spec.contract import InputError, config_from_dict
from unisono_torch.onnx import export
from unisono_torch.onnx import ops as functions
from unisono_torch.onnx.export import example

from .graphs import CONFIGS, check, graph, model

export_module = sys.modules[export.__module__]

READ_ALONE = """
import json, sys
sys.modules["torch"] = sys.modules["unisono_torch"] = sys.modules["unisono_spec"] = None  # importing one would fail
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


def test_metadata_holds_the_config_and_what_is_given_and_the_model_is_unchanged(tmp_path: Path) -> None:
    training = model("binary").train()
    export(training, tmp_path / "a.onnx", {"unisono.tokenizer": "bytes"})
    assert training.training, "export changed the model's mode"
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert config_from_dict(json.loads(metadata["unisono.config"])) == CONFIGS["binary"]
    assert metadata["unisono.tokenizer"] == "bytes"
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_weights_that_do_not_fit_go_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "MAX_EMBEDDED_BYTES", 0)
    export(model("binary"), tmp_path / "a.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)


def test_bfloat16_parameters_compute_in_float32(tmp_path: Path) -> None:
    narrow = unisono_torch.create(CONFIGS["adaptive"], seed=3, param_dtype="bfloat16")
    export(narrow, tmp_path / "a.onnx")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes_are_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype='float32'"):
        export(model("binary", dtype), tmp_path / "a.onnx")
    assert not any(tmp_path.iterdir())


def test_names_are_unicode(tmp_path: Path) -> None:
    """A file's name may be any bytes, which Python holds as halves of surrogate pairs; ONNX's are UTF-8."""
    for name, metadata in (("\udcff.onnx", {}), ("a.onnx", {"unisono.tokenizer": "\udcff"})):
        with pytest.raises(InputError, match="is no Unicode text"):
            export(model("binary"), tmp_path / name, metadata)
    assert not any(tmp_path.iterdir())


def test_metadata_must_be_strings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"json\.dumps"):
        export(model("binary"), tmp_path / "a.onnx", {"vocabulary": [1]})  # pyright: ignore[reportArgumentType]


def test_graph_that_disagrees_is_not_written_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.onnx").write_bytes(b"old")
    whole = functions.definitions

    def lost() -> list[onnx.FunctionProto]:
        """Without what the state before a chunk adds."""
        protos = whole()
        for node in next(proto for proto in protos if proto.name == "DecayedSum").node:
            for body in (attribute.g for attribute in node.attribute if attribute.name == "body"):
                add = next(inner for inner in body.node if inner.op_type == "Add")
                add.input[1] = add.input[0]
        return protos

    monkeypatch.setattr(functions, "definitions", lost)
    monkeypatch.setattr(export_module, "_traced", {})
    with pytest.raises(InputError, match="disagree at B="):
        export(model("binary"), tmp_path / "a.onnx")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.onnx", b"old")]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        export(model("binary"), tmp_path / "file" / "a.onnx")


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".a.onnx.0123abcd.part"
    left.mkdir()
    (left / "a.onnx").write_bytes(b"half")
    export(model("binary"), tmp_path / "a.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_threads_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's state is one a process: two at once would trace into each other."""
    monkeypatch.setattr(export_module, "_traced", {})
    names = ("binary", "adaptive")
    models = [model(name) for name in names]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: export(pair[0], tmp_path / f"{pair[1]}.onnx"), zip(models, names, strict=True)))
    for name in names:
        onnx.checker.check_model(tmp_path / f"{name}.onnx", full_check=True)
        metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / f"{name}.onnx").metadata_props}
        assert config_from_dict(json.loads(metadata["unisono.config"])) == CONFIGS[name]


def test_the_config_in_the_metadata_is_the_model_s(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="own config"):
        export(model("binary"), tmp_path / "a.onnx", {"unisono.config": "{}"})
