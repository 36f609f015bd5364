"""A clip that a model goes on with: its own frames come back as its input, and each way is scored by the same frames."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from unisono_conformance import judge, numerics
from unisono_spec.contract import init_params, preset
from unisono_tools.backends.numpy import Reader
from unisono_tools.experiments import clip, figures
from unisono_tools.tasks import open_task
from unisono_tools.tasks.video import Video


@pytest.fixture
def task(tmp_path, monkeypatch):
    for name, value in (("READ", 3), ("WRITTEN", 5), ("HORIZONS", (1, 3, 5)), ("SHOWN", (1, 5))):
        monkeypatch.setattr(clip, name, value)
    frames = np.random.default_rng(0).random((120, 4, 4))
    np.save(tmp_path / "film.npy", frames)
    found = open_task("video", {"dataset": str(tmp_path / "film.npy"), "side": 4, "frames": 4})
    assert isinstance(found, Video)
    return found


@pytest.mark.parametrize("head", ["gaussian", "bernoulli"])
def test_a_model_reads_what_it_wrote(task, head):
    config = preset("cram-demo", d_model=8, n_layers=1, codes="frame", frame_size=16, frame_head=head)
    reader = Reader(config, init_params(config, 1), "float64")
    given = task.part("test")[:6]
    means = clip.go_on(reader, given, 4, None)
    whole = np.concatenate([given, means])[None, :-1]
    logits, _ = reader.forward(whole, reader.init_state(1, whole.shape[1]))
    mean = np.split(logits, 2, -1)[0] if head == "gaussian" else 1 / (1 + np.exp(-logits))
    judge.same(means, mean[0, 5:], limit=numerics.rounding("float32", 2**8))
    drawn = clip.go_on(reader, given, 4, np.random.default_rng(1))
    assert np.isfinite(drawn).all()
    assert not np.array_equal(drawn, means)
    assert np.array_equal(drawn, clip.go_on(reader, given, 4, np.random.default_rng(1)))
    if head == "bernoulli":
        assert set(np.unique(drawn)) <= {0.0, 1.0}


def test_each_way_is_scored_by_the_same_frames(task, tmp_path):
    config = preset("cram-demo", d_model=8, n_layers=1, codes="frame", frame_size=16, frame_head="gaussian")
    found, clips = clip.measure(Reader(config, init_params(config, 1), "float64"), task)
    assert found["starts"] == 1  # 12 frames of test: 3 are read, 5 are written, and the next start would be 10 later
    truth, last = task.part("test")[4:9], task.part("test")[3]
    assert np.array_equal(clips["recorded"], truth)
    mean = task.part("train").mean(dtype=np.float64)
    for h in (1, 3, 5):
        wanted = 1 - np.square(truth[h - 1] - last).sum(dtype=np.float64) / np.square(truth[h - 1] - mean).sum()
        judge.same(np.float64(found["explained"]["persistence"][str(h)]), wanted, limit=numerics.rounding("float32", 2**10))
    page = clip.markdown({"run": {"command": "x"}, **found})
    assert f"{found['explained']['model']['5']:.3f}" in page
    clip.draw(clips, 4, tmp_path / "frames.png")
    clip.film(clips, 4, tmp_path / "frames.gif")
    assert figures.marked(tmp_path / "frames.png") is None
    with Image.open(tmp_path / "frames.gif") as film:
        assert (film.size, getattr(film, "n_frames", 1)) == ((3 * 4 * clip.SCALE, 4 * clip.SCALE), 5)
