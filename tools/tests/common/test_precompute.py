"""ξ of a corpus: equal to the definition whatever the chunks, documents honoured, and never half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec.contract import Config, InputError, preset
from unisono_spec.ops import decayed_sum
from unisono_spec.ops.elementwise import binary_digits
from unisono_tools import precompute as module
from unisono_tools.data import stored
from unisono_tools.data.batches import positions
from unisono_tools.precompute import PrecomputedCorpus, precompute

IDS = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
DOCUMENTS = np.array([0, 1, 63, 64, 65, 400, 999])
ONCE = numerics.rounding("float32", 1) + numerics.forms()  # sums in float64, rounded once


def definition(config, ids, documents) -> np.ndarray:
    """ξ by the spec's recurrence, in float64."""
    x = binary_digits(ids, config.code_bits, np.dtype(np.float64)) if ids.ndim == 1 else ids.astype(np.float64)
    reset = np.isin(np.arange(len(ids)), documents)
    return decayed_sum.recurrent(x[None], config.decay, np.zeros((1, config.code_size)), reset[None])[0][0]


@pytest.mark.parametrize("chunk", [1, 63, 64, 130, 5000])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_it_is_the_definition(tmp_path: Path, chunk, decay):
    config = preset("cram-demo", decay=decay)
    made = precompute(config, IDS, tmp_path, chunk=chunk, documents=DOCUMENTS)
    judge.same(made.xi, definition(config, IDS, DOCUMENTS), ONCE)
    assert np.array_equal(made.ids, IDS)


def test_frames(tmp_path: Path):
    frames = np.random.default_rng(1).normal(size=(300, 5)).astype(np.float32)
    config = preset("cram-video", frame_size=5)
    made = precompute(config, frames, tmp_path, chunk=77)
    judge.same(made.xi, definition(config, frames, [0]), ONCE)
    xi, targets = made.batch(0, 0, 4)
    assert (xi.shape, targets.shape, targets.dtype) == ((4, 5), (4, 5), np.float32)
    with pytest.raises(InputError, match="frame_size is 6"):
        precompute(preset("cram-video", frame_size=6), frames, tmp_path / "other")


def test_the_decayed_sum_of_many_blocks():
    u = np.random.default_rng(2).random((64 * 64 * 2 + 5, 2))
    state = np.array([3.0, -1.0])
    expected, s = [], state
    for row in u:
        s = 0.999 * s + row
        expected.append(s)
    judge.same(module._decayed_sums(u, 0.999, state), np.array(expected), numerics.rounding("float64", 2**12))


def test_targets_follow_their_positions(tmp_path: Path):
    made = precompute(preset("cram-demo"), IDS, tmp_path)
    xi, targets = made.batch(seed=5, step=9, batch_size=64)
    at = positions(len(IDS), 5, 9, 64)
    assert np.array_equal(xi, made.xi[at])
    assert np.array_equal(targets, IDS[at + 1])
    assert at.max() < len(IDS) - 1


def test_progress_reaches_the_end(tmp_path: Path):
    seen = []
    precompute(preset("cram-demo"), IDS, tmp_path, chunk=300, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(300, 1000), (600, 1000), (900, 1000), (1000, 1000)]


def test_what_fits_is_kept_and_what_does_not_is_made_anew(tmp_path: Path):
    calls = []

    def again(config: Config, ids: np.ndarray, documents: np.ndarray | None = None) -> None:
        precompute(config, ids, tmp_path, progress=lambda *_: calls.append(1), documents=documents)

    again(preset("cram-demo"), IDS)
    again(preset("cram-demo", d_model=32), IDS.astype(np.int64))
    assert len(calls) == 1
    again(preset("cram-demo", decay=0.7), IDS)
    assert len(calls) == 2
    again(preset("cram-demo", decay=0.7), IDS, DOCUMENTS)
    assert len(calls) == 3


def test_an_interrupted_one_leaves_what_was_there(tmp_path: Path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(preset("cram-demo"), IDS, tmp_path, progress=stop)
    with pytest.raises(InputError, match="no finished ξ"):
        PrecomputedCorpus.open(tmp_path)
    made = precompute(preset("cram-demo"), IDS, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        precompute(preset("cram-demo", decay=0.7), IDS, tmp_path, progress=stop)
    assert np.array_equal(PrecomputedCorpus.open(tmp_path, preset("cram-demo")).xi, made.xi)
    assert len(list(tmp_path.iterdir())) == 3


# In a child for each n: makes ξ of another decay over the one that is there, and is killed at its n-th call that touches names or syncs.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from unisono_spec.contract import preset
from unisono_tools.precompute import precompute
source, out, ids = Path(sys.argv[1]), Path(sys.argv[2]), np.arange(256).astype(np.uint8)

def deadly(function, n, calls=[0]):
    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for n in range(1, 60):
    folder = out / str(n)
    shutil.copytree(source, folder)
    child = os.fork()
    if child == 0:
        os.fsync = lambda handle: None  # a kill is no power cut, and disks are slow
        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, deadly(getattr(os, name), n))
        precompute(preset("cram-demo", decay=0.7), ids, folder)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_killed_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What stands there is whole and of one config, or is said to be unfinished; the next run makes it, and leaves nothing else."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    ids, old, new = np.arange(256).astype(np.uint8), preset("cram-demo"), preset("cram-demo", decay=0.7)
    whole = [precompute(config, ids, tmp_path / name).xi for name, config in (("source", old), ("expected", new))]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "source"), str(tmp_path / "killed")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "killed").iterdir(), key=lambda folder: int(folder.name))
    assert len(folders) > 8
    for folder in folders:
        try:
            found = PrecomputedCorpus.open(folder).xi
            assert any(np.array_equal(found, xi) for xi in whole)
        except InputError as error:
            assert "unisono precompute" in str(error)  # noqa: PT017
        assert np.array_equal(precompute(new, ids, folder).xi, whole[1])
        assert sorted(path.name for path in folder.iterdir()) == ["ids.npy", "manifest.json", "xi.npy"]


def test_a_reader_lives_while_its_files_are_replaced_or_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for share in (8, 1 << 60):  # in memory, in the file
        monkeypatch.setattr(stored, "SHARE", share)
        made = precompute(preset("cram-demo"), IDS, tmp_path / str(share))
        before = [made.batch(0, step, 8) for step in range(3)]
        precompute(preset("cram-demo", decay=0.7), IDS, tmp_path / str(share))
        for step, (xi, targets) in enumerate(before):
            again = made.batch(0, step, 8)
            assert np.array_equal(again[0], xi)
            assert np.array_equal(again[1], targets)
    made = PrecomputedCorpus.open(tmp_path / str(share))
    os.truncate(tmp_path / str(share) / "xi.npy", 200)
    with pytest.raises(InputError, match="changed while it was read"):
        made.batch(0, 0, 8)


@pytest.mark.parametrize("name", ["xi.npy", "ids.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "longer", "a bit", "empty", "foreign"])
def test_damage_is_noticed_and_mended(tmp_path: Path, name, damage):
    expected = precompute(preset("cram-demo"), IDS, tmp_path).xi
    path, data = tmp_path / name, (tmp_path / name).read_bytes()
    changed = {
        "truncated": data[:-20],
        "longer": data + b"0" * 8,
        "a bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "empty": b"",
        "foreign": b"[1]",
    }
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    with pytest.raises(InputError, match="run `unisono precompute` again"):
        PrecomputedCorpus.open(tmp_path)
    assert np.array_equal(precompute(preset("cram-demo"), IDS, tmp_path).xi, expected)


def test_it_must_belong_to_the_config_and_the_text(tmp_path: Path):
    precompute(preset("cram-demo"), IDS, tmp_path)
    PrecomputedCorpus.open(tmp_path, preset("cram-demo", n_layers=9), IDS.astype(np.int32))
    with pytest.raises(InputError, match=r"made with decay=0\.5, the config says 0\.6"):
        PrecomputedCorpus.open(tmp_path, preset("cram-demo", decay=0.6))
    with pytest.raises(InputError, match="another text"):
        PrecomputedCorpus.open(tmp_path, ids=IDS[::-1])
    record = tmp_path / "manifest.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "version": 99}))
    with pytest.raises(InputError, match="version 99"):
        PrecomputedCorpus.open(tmp_path)


@pytest.mark.parametrize("config", [preset("cram-1m"), preset("cram-demo", codes="embedding")])
def test_trained_codes_are_refused(tmp_path: Path, config):
    with pytest.raises(InputError, match="not precomputable"):
        precompute(config, IDS, tmp_path)


def test_bad_ids_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="outside the vocabulary"):
        precompute(preset("cram-demo"), np.array([1, 2, 256, 3]), tmp_path)
    with pytest.raises(InputError, match="longer text"):
        precompute(preset("cram-demo"), IDS[:1], tmp_path)
    with pytest.raises(InputError, match="documents"):
        precompute(preset("cram-demo"), IDS, tmp_path, documents=np.array([0, 1000]))


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        precompute(preset("cram-demo"), IDS, tmp_path)
