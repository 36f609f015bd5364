"""What is read back — YAML, trainer.json, moments — is bounded and typed: other content is one InputError that names the place."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from unisono_spec.contract import InputError
from unisono_spec.contract.files import save_arrays
from unisono_tools.config import TrainConfig, dump, flatten, from_dict, to_dict
from unisono_tools.reading import dump_yaml, parse_yaml, read_yaml
from unisono_tools.train import checkpoint

BOMB = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (BOMB, "anchors"),
        ("a: *b", "aliases"),
        ("a: &b {c: *b}", "anchors"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("<<: {a: 1}\n<<: {b: 1}", "twice"),
        ("? [1, 2]\n: 3", "a name is not a text"),
        ("a: !!int 3", "tags"),
        ("a: !!timestamp 2001-01-01", "tags"),
        ("a: " + "[" * 100_000, "deep"),
        ("a: " + "{b: " * 5_000, "deep"),
        ("\n".join(f"{' ' * i}a:" for i in range(500)), "deep"),
        (f"a: {'9' * 400}", "digits"),
        (f"a: {2**63}", "bits"),
        ("a: [1", "not YAML"),
        ("a: 1\n---\nb: 2", "document"),
        ("a: \x07", "not YAML"),
        ('a: "\\0"', "NUL"),
        ("a: 'b", "not YAML"),
        ("%YAML 9.9\n---\na: 1", "not YAML"),
        ("\t- a", "not YAML"),
    ],
)
def test_yaml_is_bounded(text, word, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    begun = time.process_time()
    with pytest.raises(InputError) as error:
        read_yaml(path)
    assert word in str(error.value)
    assert str(path) in str(error.value)
    assert time.process_time() - begun < 2


def test_yaml_of_a_large_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: " + "1 " * 200_000)
    with pytest.raises(InputError, match="longer than"):
        read_yaml(path)


def test_yaml_is_the_core_schema():
    """As YAML 1.2 has it; what safe_dump writes is read as it was."""
    found = parse_yaml("{a: 2e-3, b: 0x10, c: no, d: 1:30, e: 2001-01-01, f: ~, g: true, h: .5, i: '1', j: -.inf, k: 1e3, l: 007}", "")
    assert list(found.values()) == [2e-3, 16, "no", "1:30", "2001-01-01", None, True, 0.5, "1", -np.inf, 1e3, 7]
    values = {
        "a": ["no", "1:30", "~", "1e3", "0x1", "é", " x ", "a: b", "#", ""],
        "b": 1e-8,
        "c": -3,
        "d": None,
        "e": False,
        "f": {"g": 1e300},
    }
    assert parse_yaml(dump_yaml(values), "") == values
    assert from_dict(parse_yaml(dump(TrainConfig()), "")) == TrainConfig()


OTHERS = ([], {}, [1], {"a": 1}, "x", True, 3, -1, 0, 2**62, 0.5, 1e300, None)


def test_every_field_of_a_checkpoint_is_typed(tiny, made, tmp_path):
    """A value of another type in any field is an error that names the field, or one that the run accepts."""
    path = checkpoint.save(tmp_path, made(tiny())) / checkpoint.TRAINER
    good = json.loads(path.read_text())
    names = [name for name in flatten(good) if not name.startswith("versions.")]
    assert len(names) > 30
    for name in names:
        for other in OTHERS:
            values = json.loads(json.dumps(good))
            *parents, leaf = name.split(".")
            inner = values
            for parent in parents:
                inner = inner[parent]
            inner[leaf] = other
            path.write_text(json.dumps(values))
            try:
                checkpoint.load(path.parent)
            except InputError as error:
                assert name in str(error) or "not of one checkpoint" in str(error) or leaf in str(error)  # noqa: PT017
            del inner[leaf]
            path.write_text(json.dumps(values))
            try:
                checkpoint.load(path.parent)
            except InputError as error:
                assert leaf in str(error) or "not of one checkpoint" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "[" * 20000, '{"step": NaN}', "9" * 5000, "null", "\0", '{"step": 1}', " " * 2_000_000]
)
def test_a_trainer_json_of_another_kind(tiny, made, tmp_path, text):
    path = checkpoint.save(tmp_path, made(tiny())) / checkpoint.TRAINER
    path.write_text(text)
    with pytest.raises(InputError, match=r"trainer\.json"):
        checkpoint.load(path.parent)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("m.norm.bias", np.nan, "NaN"),
        ("v.norm.bias", np.inf, "infinite"),
        ("v.norm.bias", -1e-9, "negative"),
        ("count", -1, "count is -1"),
        ("count", 2**31, "count is"),
        ("count", 3, "not of one checkpoint"),
    ],
)
def test_moments_that_no_run_has(tiny, made, tmp_path, name, value, word):
    saved = made(tiny())
    path = checkpoint.save(tmp_path, saved)
    arrays = load_file(path / checkpoint.OPTIMIZER)
    arrays[name].flat[0] = value
    save_arrays(path / checkpoint.OPTIMIZER, arrays, saved.config, "optimizer")
    with pytest.raises(InputError, match=word):
        checkpoint.load(path)


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.complex64, np.bool_])
@pytest.mark.parametrize("name", ["m.norm.bias", "count"])
def test_moments_of_another_dtype(tiny, made, tmp_path, name, dtype):
    saved = made(tiny())
    path = checkpoint.save(tmp_path, saved)
    arrays = load_file(path / checkpoint.OPTIMIZER)
    save_arrays(path / checkpoint.OPTIMIZER, {**arrays, name: arrays[name].astype(dtype)}, saved.config, "optimizer")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        checkpoint.load(path)


def test_to_dict_is_what_from_dict_reads(tiny):
    config = tiny(overrides={"decay": 0.25, "tie_head": False})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
