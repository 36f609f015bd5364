"""Tasks of data sets: what they read, how it is split, kept and carried, and what their trivial predictors reach."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from unisono_spec.contract import InputError
from unisono_tools import trivial
from unisono_tools.data import labelled, mails
from unisono_tools.tasks import open_task
from unisono_tools.tasks.base import Examples, Task


def _all(task, split):
    (setting,) = task.settings(split)
    return task.examples(split, setting, np.arange(task.size(split, setting)))


@pytest.mark.usefixtures("small_sets")
def test_text_is_the_beginning_of_a_body():
    task = open_task("text", {"bytes": 40})
    seen = []
    for split in ("train", "validation", "test"):
        found = _all(task, split)
        assert found.valid is not None
        assert (found.scored.sum(1) == 1).all()
        assert (found.scored.argmax(1) == found.valid.sum(1) - 1).all()
        for inputs, valid, label in zip(found.inputs, found.valid, found.targets[found.scored], strict=True):
            body = bytes(inputs[valid].astype(np.uint8)).decode()
            assert body.startswith(("patch ", "offer ")[label])
            assert "Subject" not in body
            seen.append(body)
    assert len(seen) == len(set(seen)) == 60  # of 62 mails two are nearly others
    assert [task.size(split, "documents") for split in ("train", "validation", "test")] == [48, 6, 6]
    assert open_task("text").length("documents") == 4096


def test_mails_that_are_alike_are_one():
    first = " ".join(f"word{chr(97 + i)}" for i in range(20)).encode()
    found = mails.distinct([(first, True), (first.upper() + b" 1999", False), (b"", True), (b"another short one", False)])
    assert found == [(first, True), (b"another short one", False)]
    # 16 runs of five words in one, 11 of them in the other, which has 16 as well: 11 / 21 in common, and 10 / 22 are too few
    words = first.split()
    for changed, number in ((5, 1), (6, 2)):
        other = b" ".join([*words[changed:], *(b"new" + bytes([97 + i]) for i in range(changed))])
        assert len(mails.distinct([(first, True), (other, True)])) == number


@pytest.mark.usefixtures("small_sets")
def test_an_image_is_read_row_by_row_within_a_margin():
    task = open_task("image", {"side": 6})
    assert [task.size(split, "images") for split in ("train", "validation", "test")] == [54, 6, 20]
    found = _all(task, "test")
    grid = found.inputs.reshape(-1, 6, 6)
    assert not grid[:, [0, -1]].any()
    assert not grid[:, :, [0, -1]].any()
    whole = open_task("image", {"side": 4})
    assert np.array_equal(grid[:, 1:5, 1:5].reshape(20, 16), _all(whole, "test").inputs)
    assert sorted(found.targets[found.scored]) == sorted(2 * [*range(10)])
    # each picture of the archive with its class, read here byte by byte
    folder = Path(os.environ["UNISONO_CACHE"]) / "fashion-mnist"
    for part, splits in (("train", ("train", "validation")), ("t10k", ("test",))):
        pictures, classes = (gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes()) for kind in ("images-idx3", "labels-idx1"))
        having = {pictures[16 + 16 * i : 32 + 16 * i]: label for i, label in enumerate(classes[8:])}
        read = {}
        for e in (_all(whole, split) for split in splits):
            read |= {bytes(row.astype(np.uint8)): label for row, label in zip(e.inputs, e.targets[e.scored], strict=True)}
        assert read == having
    train = np.concatenate([_all(whole, split).inputs for split in ("train", "validation")])
    assert len(np.unique(train, axis=0)) == 60
    with pytest.raises(InputError, match=r"side: 3; its pictures have 4 × 4 pixels, use 4 or more"):
        open_task("image", {"side": 3}).size("train", "images")
    assert open_task("image").length("images") == 1024


@pytest.mark.usefixtures("small_sets")
def test_a_set_goes_where_no_network_is(command, refused, tmp_path, monkeypatch):
    for name in ("set.safetensors", "set.safetensors.xz"):
        path = tmp_path / name
        code, out, _ = command("task", "text", "--write", path)
        assert code == 0
        assert f"{path.stat().st_size:,} bytes" in out
        carried, task = open_task("text", {"dataset": str(path)}), open_task("text")
        assert np.array_equal(_all(carried, "test").inputs, _all(task, "test").inputs)
        assert carried.digest == task.digest  # a run goes on with it
    command("task", "text", "--write", tmp_path / "few", "--examples", 5)
    few = open_task("text", {"dataset": str(tmp_path / "few")})
    assert [few.size(split, "documents") for split in ("train", "validation", "test")] == [5, 5, 5]
    assert few.digest != open_task("text").digest
    (tmp_path / "bad").write_bytes(path.read_bytes()[:-9])
    for options, said in (
        ({"dataset": str(tmp_path / "bad")}, "no data set that `unisono task NAME --write FILE` wrote"),
        ({"dataset": "spam-asassin"}, "did you mean 'spam-assassin'"),
        ({"dataset": "fashion-mnist"}, "has no classes of texts"),
        ({"bytes": 0}, "bytes: 0"),
    ):
        with pytest.raises(InputError, match=said):
            open_task("text", options).size("train", "documents")
    with pytest.raises(InputError, match=r"bytes: 1000000000000.*read fewer of a document"):
        open_task("text", {"bytes": 10**12}).examples("train", "documents", np.arange(2))
    with pytest.raises(InputError, match="has no pictures"):
        open_task("image", {"dataset": "sotu"}).size("train", "images")
    assert "its examples are drawn" in refused("task", "mqar", "--write", tmp_path / "x")
    code, out, _ = command("task", "text", "--baselines", "--write", tmp_path)
    assert code == 2
    assert "bag of bytes" not in out  # a baseline, which may take long
    # without a network the line names the way out
    monkeypatch.undo()
    monkeypatch.setenv("UNISONO_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("unisono_tools.data.registry._client", lambda name: "false")
    assert "--write FILE" in refused("task", "image")


def test_a_file_that_does_not_fit_together(tmp_path):
    items = [("", np.full(i + 1, i, np.uint8), i % 2) for i in range(30)]
    found = labelled.split_up("made", items)
    assert [len(found.parts[split]) for split in labelled.SPLITS] == [24, 3, 3]
    assert sorted(len(found.parts[split][i]) for split in labelled.SPLITS for i in range(len(found.parts[split]))) == [*range(1, 31)]
    part = found.parts["train"]
    assert (np.diff([len(part[i]) for i in range(len(part))]) < 0).any()  # a set that lies class by class is not read so
    for changed in (
        labelled.Part(part.values[:-1], part.starts, part.labels),
        labelled.Part(part.values, part.starts[::-1].copy(), part.labels),
        labelled.Part(part.values, part.starts, part.labels + 5),
        labelled.Part(part.values.astype(np.int16), part.starts, part.labels),
    ):
        labelled.write(labelled.Labelled("made", {**found.parts, "train": changed}, (), 2, ""), tmp_path / "set")
        with pytest.raises(InputError, match="write it again"):
            labelled.read(tmp_path / "set")
    with pytest.raises(InputError, match="give 10 or more"):
        labelled.split_up("made", items[:9])


def test_hub_sets_keep_their_splits(monkeypatch, tmp_path):
    pictures = [{"img": Image.new("RGB", (4, 4), (i, i, i)), "label": i % 3} for i in range(40)]
    texts = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
    sets = {
        "uoft-cs/cifar10": {"train": pictures, "test": pictures[:8]},
        "stanfordnlp/imdb": {"train": texts, "unsupervised": [{}], "test": texts},
    }
    module = ModuleType("datasets")
    module.load_dataset = lambda name, *_, **__: sets[name]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setenv("UNISONO_CACHE", str(tmp_path))
    image = open_task("image", {"dataset": "cifar10", "side": 4})
    assert [image.size(split, "images") for split in ("train", "validation", "test")] == [36, 4, 8]
    found = _all(image, "test")
    assert sorted(found.inputs[:, 0]) == [*range(8)]
    assert (found.targets[found.scored] == found.inputs[:, 0] % 3).all()
    text = open_task("text", {"dataset": "imdb"})
    assert [text.size(split, "documents") for split in ("train", "validation", "test")] == [36, 4, 40]
    del texts[0]["label"]
    with pytest.raises(InputError, match="has no 'label' to classify by"):
        open_task("text", {"dataset": "hf:stanfordnlp/imdb"}).size("train", "documents")


@pytest.mark.usefixtures("small_sets")
def test_trivial_predictors_are_what_they_are_called(command):
    code, out, _ = command("task", "text", "--baselines")
    assert code == 0
    test = _all(open_task("text"), "test")
    scores = open_task("text").baselines()["documents"]
    assert scores["bag of bytes"] == 1  # "!" tells the classes of these mails apart
    assert f"{scores['majority']:.4f}" in out
    labels = test.targets[test.scored]
    assert scores["majority"] in ((labels == 0).mean(), (labels == 1).mean())
    found = open_task("listops", {"max_depth": 3, "max_args": 3, "min_length": 3, "max_length": 12}).baselines(number=64)["lists"]
    assert 0 < found["majority"] < 1


@pytest.mark.parametrize(("columns", "loud", "best"), [(1, 10.0, 0), (60, 1.0, 2)])
def test_validation_chooses_the_ridge(columns, loud, best):
    """A faint sign of the class beside one loud column of noise needs a small ridge; beside as many columns as examples, a large one."""
    random = np.random.default_rng(3)
    classes = {split: random.integers(0, 2, n) for split, n in (("train", 60), ("validation", 400), ("test", 400))}

    def drawn(y):
        sign = 2 * y - 1 + 0.7 * random.standard_normal(len(y))
        return np.concatenate([sign[:, None], loud * random.standard_normal((len(y), columns))], 1)

    values = {split: drawn(y) for split, y in classes.items()}

    class Made(Task):
        name, source = "made", ""

        @property
        def vocab_size(self):
            return 2

        def settings(self, split):
            return {"one": 1.0}

        def length(self, setting):
            return 1

        def size(self, split, setting):
            return len(classes[split])

        def examples(self, split, setting, numbers, seed=0):
            y = classes[split][numbers, None]
            return Examples(values[split][numbers, :, None], y, np.ones(y.shape, bool))

    def fitted(ridge, split):
        """Least squares of rows below which √(ridge · mean square) stands on the diagonal."""
        x, judged = (np.concatenate([values[part], np.ones((len(values[part]), 1))], 1) for part in ("train", split))
        size = x.shape[1]
        below = np.sqrt(ridge * np.square(x).sum() / size) * np.eye(size)
        wanted = np.concatenate([np.eye(2)[classes["train"]], np.zeros((size, 2))])
        weights, *_ = np.linalg.lstsq(np.concatenate([x, below]), wanted, rcond=None)
        return (judged @ weights).argmax(1)

    scores = [float((fitted(ridge, "validation") == classes["validation"]).mean()) for ridge in trivial.RIDGES]
    assert scores.index(max(scores)) == best
    assert scores[best] > scores[2 - best]
    predict = trivial.linear(Made(), lambda examples: examples.inputs[..., 0])
    assert np.array_equal(predict(Made().examples("test", "one", np.arange(400)))[:, 0], fitted(trivial.RIDGES[best], "test"))


def test_published_images_are_read_where_they_lie(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "imgs" / "0").mkdir(parents=True)
    lines = []
    for i in range(20):
        Image.fromarray(np.full((32, 32), 10 * i, np.uint8)).save(tmp_path / "imgs" / "0" / f"sample_{i}.png")
        lines.append(f"imgs/0 sample_{i}.png {i} {i % 2} 1.0 2.0 14")
    (tmp_path / "metadata" / "0.npy").write_text("\n".join(lines))
    task = open_task("pathfinder", {"folder": str(tmp_path)})
    assert [task.size(split, "images") for split in ("train", "validation", "test")] == [16, 2, 2]
    seen = []
    for split in ("train", "validation", "test"):
        found = task.examples(split, "images", np.arange(task.size(split, "images") or 0))
        assert (found.targets[found.scored] == found.inputs[:, 0] // 10 % 2).all()
        seen += (found.inputs[:, 0] // 10).tolist()
    assert sorted(seen) == list(range(20))
    with pytest.raises(InputError, match="LRA's layout"):
        open_task("pathfinder", {"folder": str(tmp_path / "imgs")}).size("train", "images")
