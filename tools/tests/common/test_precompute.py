"""ξ of a corpus: equal to the definition whatever the chunks, documents honoured, and never half."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from unisono_spec.contract import Config, InputError, preset
from unisono_spec.ops import decayed_sum
from unisono_spec.ops.elementwise import binary_digits
from unisono_tools import precompute as module
from unisono_tools.data.batches import positions
from unisono_tools.precompute import PrecomputedCorpus, precompute

IDS = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
DOCUMENTS = np.array([0, 1, 63, 64, 65, 400, 999])


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
    # float64 sums, rounded once
    assert np.array_equal(made.xi, definition(config, IDS, DOCUMENTS).astype(np.float32)) or (
        np.abs(made.xi - definition(config, IDS, DOCUMENTS)).max() <= np.finfo(np.float32).eps / 2
    )
    assert np.array_equal(made.ids, IDS)


def test_frames(tmp_path: Path):
    frames = np.random.default_rng(1).normal(size=(300, 5)).astype(np.float32)
    config = preset("cram-video", frame_size=5)
    made = precompute(config, frames, tmp_path, chunk=77)
    assert np.abs(made.xi - definition(config, frames, [0])).max() <= np.finfo(np.float32).eps / 2
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
    assert np.allclose(module._decayed_sums(u, 0.999, state), expected, rtol=1e-12, atol=0)


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


def test_an_interrupted_one_is_never_taken_for_whole(tmp_path: Path):
    precompute(preset("cram-demo"), IDS, tmp_path)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(preset("cram-demo", decay=0.7), IDS, tmp_path, progress=stop)
    with pytest.raises(InputError, match="no finished ξ"):
        PrecomputedCorpus.open(tmp_path)


@pytest.mark.parametrize("name", ["xi.npy", "ids.npy"])
def test_truncated_files_are_noticed(tmp_path: Path, name):
    precompute(preset("cram-demo"), IDS, tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="truncated"):
        PrecomputedCorpus.open(tmp_path)


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

    monkeypatch.setattr(module, "_header", full)
    with pytest.raises(InputError, match="No space left"):
        precompute(preset("cram-demo"), IDS, tmp_path)
