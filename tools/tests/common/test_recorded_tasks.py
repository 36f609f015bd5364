"""DNA, retrieval and video: windows, pairs and clips are what they are called, and so are the baselines, by other means than the tasks'."""

from __future__ import annotations

import collections
import gzip
import math

import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError, init_params, preset
from unisono_tools.backends.numpy import Reader
from unisono_tools.evaluation import nll
from unisono_tools.tasks import dna, open_task, retrieval, video
from unisono_tools.train.task_datamodule import check_task, evaluate_task


@pytest.fixture
def genome(tmp_path):
    """A file of 4,000 bases with a gap, of which 3,000 to 3,400 are held out; the file, and its text."""
    random = np.random.default_rng(1)
    text = list("".join("ACGT"[i] for i in random.choice(4, 4000, p=[0.5, 0.2, 0.2, 0.1])))
    text[1000:1500] = "N" * 500
    path = tmp_path / "made.fa.gz"
    path.write_bytes(gzip.compress(f">made\n{''.join(text).lower()}\n".encode()))
    return {"dataset": str(path), "held_out": [3000, 3400], "train": [50], "test": [50, 100]}, "".join(text)


def _letters(ids):
    return "".join("ACGTN"[i] for i in ids)


def test_windows_of_dna_leave_out_what_is_held_out(genome):
    options, text = genome
    task = open_task("dna", options)
    assert task.settings("test") == {"50": 0.5, "100": 0.5}
    assert task.size("train", "50") is None
    train = task.examples("train", "50", np.arange(300), 3)
    seen = np.zeros(4000, int)
    for inputs, targets, scored in zip(train.inputs, train.targets, train.scored, strict=True):
        window = _letters(inputs)
        start = text.index(window) if "N" not in window else None
        assert _letters(targets[:-1]) == window[1:]
        assert (scored == (targets != 4)).all()
        assert window.count("N") <= 25
        if start is not None:
            assert start + 51 <= 3000 or start >= 3400
            seen[start : start + 51] += 1
    assert not seen[3000:3400].any()
    assert (seen[100:900] > 0).mean() > 0.9  # every place is read with a probability of 1 − (1 − 50 / 3050)^300 = 0.99
    assert (seen[3450:3950] > 0).mean() > 0.9
    for split, (start, end), number in (("validation", (3000, 3200), 3), ("test", (3200, 3400), 3)):
        assert task.size(split, "50") == number  # 200 bases have four windows, of which the last has no base behind it
        found = task.examples(split, "50", np.arange(number))
        assert [_letters(row) for row in found.inputs] == [text[s : s + 50] for s in range(start, end - 50, 50)]
    short = open_task("dna", {**options, "held_out": [50_000_000, 55_000_000]})
    assert isinstance(short, dna.DNA)
    assert short.regions("validation") == [(3600, 3800)]
    assert short.digest != task.digest


def test_counts_are_counts(genome):
    options, text = genome
    found = open_task("dna", {**options, "test": [100]}).baselines()["100"]
    tables = {k: collections.Counter() for k in (0, 4)}
    for k, table in tables.items():
        for start, end in ((0, 3000), (3400, 4000)):
            table.update(text[i : i + k + 1] for i in range(start, end - k) if "N" not in text[i : i + k + 1])
    for k in (0, 4):
        bits = []
        window = text[3200:3301]
        for place in range(1, 101):
            order = k if place >= k else 0
            run = window[place - order : place]
            having = [tables[order][run + base] + 1 for base in "ACGT"]
            bits.append(-math.log2(having["ACGT".index(window[place])] / sum(having)))
        judge.same(np.float64(found[f"counts of order {k}"]), np.mean(bits), limit=numerics.rounding("float64", 2**10))
    for wrong, said in (
        ({"train": [0]}, "train"),
        ({"held_out": [5, 5]}, "held_out"),
        ({"held_out": [5]}, "held_out: .5.; give two"),
        ({"test": [10**6]}, "no window of 1000000 bases"),
    ):
        with pytest.raises(InputError, match=said):
            open_task("dna", {**options, **wrong}).size("test", str(10**6))


def test_dna_goes_where_no_network_is(genome, command, tmp_path):
    options, _ = genome
    task = open_task("dna", options)
    path = tmp_path / "carried.fa.xz"
    task.write(path, 0)
    assert open_task("dna", {**options, "dataset": str(path)}).digest == task.digest
    (tmp_path / "plain.txt").write_text("ACGT")
    with pytest.raises(InputError, match="is no FASTA"):
        open_task("dna", {"dataset": str(tmp_path / "plain.txt")}).size("test", "1024")


def test_pairs_are_of_one_address_or_of_two():
    task = open_task("retrieval", {"bytes": 200})
    assert isinstance(task, retrieval.Retrieval)
    parts = task.data.parts
    owners = {split: set(part.labels.tolist()) for split, part in parts.items()}
    assert sum(map(len, owners.values())) == len(set().union(*owners.values()))  # no address is in two splits
    whole = {split: [(part[i].tobytes(), part.labels[i]) for i in range(len(part))] for split, part in parts.items()}
    labels = []
    for split in ("train", "test"):
        found, low = task.examples(split, "pairs", np.arange(64), 3), set(parts[split].labels[: len(parts[split]) // 2].tolist())
        passages = np.diff(parts[split].starts) // 200
        share, firsts = passages[: len(passages) // 2].sum() / passages.sum(), 0
        assert found.valid is not None
        for inputs, label in zip(found.inputs, found.targets[found.scored], strict=True):
            assert np.flatnonzero(inputs == 256).tolist() == [200]
            one, other = bytes(inputs[:200].astype(np.uint8)), bytes(inputs[201:].astype(np.uint8))
            assert one != other
            of = [{owner for text, owner in whole[split] if piece in text} for piece in (one, other)]
            assert bool(of[0] & of[1]) == label
            labels.append(label)
            firsts += bool(of[0] & low)
        # the first is any passage of any address: of the half of the addresses that lies first, as often as it has passages
        assert np.square(firsts - 64 * share) < 16 * 64 * share * (1 - share)
    assert 40 <= sum(labels) <= 88  # of 128 throws of a fair coin; outside with a probability of 2e-5
    with pytest.raises(InputError, match="no two documents of twice that"):
        open_task("retrieval", {"bytes": 10**6}).examples("test", "pairs", np.arange(1))


@pytest.mark.usefixtures("small_sets")
def test_pairs_of_classes_are_of_one_class_or_of_two():
    task = open_task("retrieval", {"dataset": "spam-assassin", "bytes": 30})
    found = task.examples("train", "pairs", np.arange(64))
    assert found.valid is not None
    for inputs, valid, label in zip(found.inputs, found.valid, found.targets[found.scored], strict=True):
        one, _, other = bytes(np.where(inputs == 256, 0, inputs)[valid].astype(np.uint8)).partition(b"\0")
        assert (one.split()[0] == other.split()[0]) == label  # "offer" or "patch"


@pytest.fixture
def film(tmp_path):
    """100 frames of 4 × 4, a picture that wanders, of which the third and the sixth from behind are bright."""
    random = np.random.default_rng(2)
    frames = random.random((1, 4, 4)) * 1000 + np.cumsum(random.standard_normal((100, 4, 4)), 0)
    frames[[2, 95]] += 100
    np.save(tmp_path / "film.npy", frames)
    return str(tmp_path / "film.npy"), frames


def test_clips_and_what_trivial_predictors_explain(film):
    path, frames = film
    task = open_task("video", {"dataset": path, "side": 2, "frames": 4})
    small = frames.reshape(100, 2, 2, 2, 2).mean((2, 4)).reshape(100, 4).astype(np.float32).astype(np.float64)
    values = (small - small[:80].mean()) / small[:80].std()
    assert [task.size(split, "clips") for split in ("train", "validation", "test")] == [None, 2, 2]
    found = task.examples("test", "clips", np.arange(2))
    limit = numerics.rounding("float32", 2**4)
    for number, start in ((0, 89), (1, 93)):
        judge.same(found.inputs[number], values[start : start + 4], limit=limit)
        judge.same(found.targets[number], values[start + 1 : start + 5], limit=limit)
    y, before = values[90:98], values[89:97]
    total = np.square(y - values[:80].mean()).sum()
    expected = {"mean image": 1 - np.square(y - values[:80].mean(0)).sum() / total, "persistence": 1 - np.square(y - before).sum() / total}
    for name, score in task.baselines()["clips"].items():
        judge.same(np.float64(score), np.float64(expected[name]), limit=numerics.rounding("float32", 2**8))
    assert isinstance(task, video.Video)
    train = task.examples("train", "clips", np.arange(50), 3)
    assert train.inputs.max() <= task.part("train").max()
    # what a model is judged by is bits a pixel
    config = preset("cram-video", d_model=4, n_layers=1, frame_size=4, frame_head="gaussian")
    reader = Reader(config, init_params(config))
    score = evaluate_task(reader, task, "test", "clips", 2)
    logits, _ = reader.forward(found.inputs, reader.init_state(2))
    nats = nll(config, logits.reshape(8, -1), found.targets.reshape(8, 4))
    judge.same(np.float64(score.loss), np.float64(nats.mean()), limit=numerics.rounding("float32", 2**8))
    events = open_task("video", {"dataset": path, "side": 2, "frames": 4, "form": "events"})
    assert isinstance(events, video.Video)
    bright = (small > small[:80].mean(0) + 2.5 * small[:80].std(0)).astype(float)
    assert np.array_equal(events.part("test"), bright[89:])
    rate = (bright[:80].sum(0) + 0.5) / 81
    bits = -np.log2(np.where(bright[90:98] > 0, rate, 1 - rate)).mean()
    judge.same(np.float64(events.baselines()["clips"]["rates, bits a pixel"]), bits, limit=numerics.rounding("float64", 2**8))


def test_what_a_video_does_not_go_with(film, tmp_path):
    path, _ = film
    task = open_task("video", {"dataset": path, "side": 2, "frames": 4})
    frame = preset("cram-demo", codes="frame", frame_size=4, frame_head="gaussian")
    check_task(frame, task)
    for config in (preset("cram-1m"), preset("cram-demo", codes="frame", frame_size=4), preset("lat-1m")):
        with pytest.raises(InputError, match=r"frames of 4 numbers, gaussian ones.* frame --.*\.frame_size 4 --.*\.frame_head gaussian"):
            check_task(config, task)
    with pytest.raises(InputError, match="the model reads frames"):
        check_task(frame, open_task("copying"))
    np.save(tmp_path / "flat.npy", np.zeros((20, 16)))
    for options, said in (
        ({"side": 3}, "side: 3; the recording has 4 × 4"),
        ({"frames": 20}, "frames: 20; validation has 10 frames, use that many at most"),
        ({"form": "colour"}, "form"),
        ({"dataset": str(tmp_path / "flat.npy")}, "so reshape them"),
        ({"dataset": "mouse-2"}, "did you mean 'mouse-2p'"),
    ):
        with pytest.raises(InputError, match=said):
            open_task("video", {"dataset": path, "side": 2, "frames": 4, **options}).size("validation", "clips")
    task.write(tmp_path / "small.npy", 0)
    assert open_task("video", {"dataset": str(tmp_path / "small.npy"), "side": 2, "frames": 4}).digest != ""
    carried = open_task("video", {"dataset": str(tmp_path / "small.npy"), "side": 2, "frames": 4})
    assert carried.digest == task.digest
