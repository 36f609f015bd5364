"""Checkpoints: whole or not at all, at every moment."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from unisono_spec.contract import InputError
from unisono_spec.contract.files import save_arrays, save_params
from unisono_tools.train import checkpoint
from unisono_tools.train.checkpoint import Best

# In a child for each n: saves step 4 over step 2 and is killed at its n-th call that touches the disk's names or contents.
KILLED = """
import dataclasses, os, shutil, signal, sys
from pathlib import Path
from unisono_tools.train import checkpoint
source, out = Path(sys.argv[1]), Path(sys.argv[2])

def deadly(function, n, calls=[0]):
    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for n in range(1, 100):
    run = out / str(n)
    shutil.copytree(source, run)
    child = os.fork()
    if child == 0:
        old = checkpoint.load(checkpoint.latest(run))
        new = dataclasses.replace(old, step=4, optimizer={**old.optimizer, "count": old.optimizer["count"] + 2})
        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, deadly(getattr(os, name), n))
        checkpoint.save(run, new)
        checkpoint.prune(run, 1, None, 4)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""

# a real refusal by the kernel in the middle of a write
LIMITED = """
import dataclasses, resource, signal, sys
from pathlib import Path
from unisono_tools.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
old = checkpoint.load(checkpoint.latest(Path(sys.argv[1])))
checkpoint.save(Path(sys.argv[1]), dataclasses.replace(old, step=4))
"""


def _python(script: str, *argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *map(str, argv)], check=False, capture_output=True, text=True)


def test_there_and_back(tiny, made, tmp_path):
    saved = made(tiny(), best=Best(2, 1.5))
    path = checkpoint.save(tmp_path, saved)
    loaded = checkpoint.load(path)
    assert (loaded.step, loaded.train, loaded.config, loaded.best) == (saved.step, saved.train, saved.config, saved.best)
    assert loaded.tokenizer is not None
    assert (loaded.tokenizer.name, loaded.threads) == ("bytes", 1)
    for a, b in ((loaded.params, saved.params), (loaded.optimizer, saved.optimizer)):
        assert list(a) == list(b) or set(a) == set(b)
        assert all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in b)


def test_killed_at_every_moment_of_a_save(tiny, made, tmp_path):
    checkpoint.save(tmp_path / "source", made(tiny()))
    done = _python(KILLED, tmp_path / "source", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "killed").iterdir(), key=lambda run: int(run.name))
    assert len(runs) > 12
    for run in runs:
        found = checkpoint.steps(run)
        assert found
        assert set(found) <= {2, 4}
        for step, path in found.items():
            assert checkpoint.load(path).step == step  # what can be seen is whole
        checkpoint.sweep(run)
        assert all(not path.name.startswith(".") for path in (run / "checkpoints").iterdir())
    assert set(checkpoint.steps(runs[0])) == {2}
    assert set(checkpoint.steps(runs[-1])) == {4}


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_a_full_disk_is_told_and_leaves_the_old_checkpoint(tiny, made, tmp_path, monkeypatch, call):
    old = checkpoint.save(tmp_path, made(tiny(), step=2))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(InputError, match=r"No space left.*free some space"):
        checkpoint.save(tmp_path, made(tiny(), step=4))
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == old
    assert checkpoint.load(old).step == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [old.name]


def test_a_limit_on_file_size_is_a_clear_error(tiny, made, tmp_path):
    checkpoint.save(tmp_path, made(tiny()))
    done = _python(LIMITED, tmp_path)
    assert "InputError" in done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert list(checkpoint.steps(tmp_path)) == [2]


def test_the_newest_and_the_best_are_kept(tiny, made, tmp_path):
    for step in (2, 4, 6, 8, 10):
        checkpoint.save(tmp_path, made(tiny(), step))
    checkpoint.prune(tmp_path, 2, Best(4, 1.0), 10)
    assert list(checkpoint.steps(tmp_path)) == [4, 8, 10]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000010"


def test_damaged_ones_that_a_run_went_back_from_push_out_no_whole_one(tiny, made, tmp_path):
    for step in (2, 8, 10):
        checkpoint.save(tmp_path, made(tiny(), step))
    for step in (8, 10):
        _damage(checkpoint.steps(tmp_path)[step] / checkpoint.MODEL, "truncated")
    checkpoint.save(tmp_path, made(tiny(), 4))
    checkpoint.prune(tmp_path, 1, None, 4)
    assert list(checkpoint.steps(tmp_path)) == [4, 8, 10]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1].step == 4


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.TRAINER])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "foreign"])
def test_damaged_files_are_told(tiny, made, tmp_path, name, damage):
    path = checkpoint.save(tmp_path, made(tiny())) / name
    _damage(path, damage)
    with pytest.raises(InputError) as error:
        checkpoint.load(path.parent)
    assert path.name in str(error.value)


def _damage(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        from safetensors.numpy import save

        path.write_bytes(b"[1, 2]" if path.suffix == ".json" else save({"weight": np.zeros(3)}))
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")


def test_files_of_two_checkpoints_do_not_mix(tiny, made, tmp_path):
    first, second = checkpoint.save(tmp_path, made(tiny(), 2)), checkpoint.save(tmp_path, made(tiny(), 4))
    os.replace(first / checkpoint.OPTIMIZER, second / checkpoint.OPTIMIZER)
    with pytest.raises(InputError, match="not of one checkpoint"):
        checkpoint.load(second)
    other = made(tiny(overrides={"d_model": 12}))
    save_params(first / checkpoint.MODEL, other.config, other.params)
    with pytest.raises(InputError):
        checkpoint.load(first)


def test_what_a_path_means(tiny, made, tmp_path):
    path = checkpoint.save(tmp_path / "run", made(tiny()))
    for given in (tmp_path / "run", path, path / checkpoint.MODEL):
        assert checkpoint.model_file(given) == path / checkpoint.MODEL
    assert checkpoint.tokenizer_of(path / checkpoint.MODEL) == "bytes"
    assert checkpoint.training_of(path / checkpoint.MODEL) == tiny()
    for given in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="give a run's folder"):
            checkpoint.model_file(given)


def test_what_a_newer_release_wrote_is_not_called_damaged(tiny, made, tmp_path):
    path = checkpoint.save(tmp_path, made(tiny())) / checkpoint.TRAINER
    about = json.loads(path.read_text())
    about["versions"]["unisono"] = "9.9"
    for changed, word in (
        ({**about, "ema": 0.5}, "'ema'"),
        ({**about, "train": {**about["train"], "planets": 3}}, r"'train\.planets'"),
        ({**about, "format": 2}, "format 2"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=rf"{word}.* unisono 9\.9.*install") as error:
            checkpoint.load(path.parent)
        assert not isinstance(error.value, checkpoint.Damaged)
        assert "remove" not in str(error.value)


def test_the_newest_that_is_whole(tiny, made, tmp_path):
    assert checkpoint.newest(tmp_path) is None
    folders = [checkpoint.save(tmp_path, made(tiny(), step)) for step in (2, 4, 6)]
    broken = made(tiny(), 8)
    weights = checkpoint.save(tmp_path, broken) / checkpoint.MODEL
    broken.params["head.weight"][0] = np.nan
    save_arrays(weights, broken.params, broken.config, "params")
    _damage(folders[2] / checkpoint.MODEL, "truncated")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    path, loaded, wrong = found
    assert (path, loaded.step) == (folders[1], 4)
    assert ["step-00000008" in wrong[0], "step-00000006" in wrong[1]] == [True, True]
    for folder in folders[:2]:
        _damage(folder / checkpoint.OPTIMIZER, "missing")
    with pytest.raises(InputError, match="none of its checkpoints is whole"):
        checkpoint.newest(tmp_path)
