"""Tasks: found by their files, drawn as their sources say, judged by their own metric."""

from __future__ import annotations

import math

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import InputError, init_params, preset
from unisono_tools.backends.numpy import Reader
from unisono_tools.config import DataChoice, ModelChoice, TrainConfig
from unisono_tools.tasks import base, listops, names, open_task
from unisono_tools.train import task_datamodule
from unisono_tools.train.task_datamodule import TaskDataModule, evaluate_task

# of the small data sets
SMALL = {"dna": {"train": [16], "test": [16]}, "video": {"side": 4, "frames": 2}}


def _some(task, split="train", number=640):
    return {setting: task.examples(split, setting, np.arange(number), 3) for setting in task.settings(split)}


@pytest.mark.usefixtures("small_sets")
def test_every_file_is_a_task():
    assert {"mqar", "copying", "listops", "pathfinder", "phonebook", "text", "image", "retrieval", "dna", "video"} <= set(names())
    for name in names():
        task = open_task(name, SMALL.get(name))
        assert task.name == name
        for split in base.SPLITS:
            shares = task.settings(split)
            assert split == "test" or round(sum(shares.values()), 12) == 1
            for setting in shares:
                found = task.examples(split, setting, np.arange(3))
                assert found.scored.shape == (3, task.length(setting))
                width, dtype = ((task.frame_size,), np.float32) if task.frame_size else ((), np.int64)
                assert found.inputs.shape == found.targets.shape == (*found.scored.shape, *width)
                assert found.inputs.dtype == found.targets.dtype == dtype
                if not width:
                    assert min(found.inputs.min(), found.targets.min()) >= 0
                    assert max(found.inputs.max(), found.targets.max()) < task.vocab_size
                assert found.scored.any(1).all()
                if found.valid is not None:
                    assert (found.valid[:, :-1] >= found.valid[:, 1:]).all()  # shorter ones end early
                    assert (found.scored <= found.valid).all()


@pytest.mark.usefixtures("small_sets")
@pytest.mark.parametrize("name", names())
def test_an_example_is_a_function_of_its_number(name):
    task = open_task(name, SMALL.get(name))
    setting = next(iter(task.settings("train")))
    n = task.block_size if isinstance(task, base.Drawn) else 3
    whole = task.examples("train", setting, np.arange(2 * n + 2), 5)
    part = task.examples("train", setting, np.array([3, 2 * n + 1, n]), 5)
    assert np.array_equal(part.inputs, whole.inputs[[3, 2 * n + 1, n]])
    first = task.examples("train", setting, np.arange(n), 5)
    # a data set of so many examples has the same ones, whatever the seed
    own = name in ("text", "image")
    assert np.array_equal(first.inputs, task.examples("train", setting, np.arange(n), 6).inputs) == own
    assert not np.array_equal(first.inputs, task.examples("validation", setting, np.arange(n), 5).inputs)
    assert open_task(name, SMALL.get(name)).digest == task.digest


def test_mqar_asks_for_the_value_that_followed_the_key():
    task = open_task("mqar")
    assert task.vocab_size == 8192
    assert list(task.settings("test")) == ["64x4", "64x8", "64x16", "128x32", "256x64", "512x64", "512x128", "1024x256"]
    for setting, found in _some(task).items():
        pairs = int(setting.split("x")[1])
        assert (found.scored.sum(1) == pairs).all()
        assert not found.scored[:, : 2 * pairs].any()
        keys, values = found.inputs[:, 0 : 2 * pairs : 2], found.inputs[:, 1 : 2 * pairs : 2]
        assert keys.min() >= 1
        assert keys.max() < 4096 <= values.min()
        for row in range(40):
            assert len(set(keys[row])) == len(set(values[row])) == pairs
            table = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
            at = np.flatnonzero(found.scored[row])
            assert (at % 2 == 0).all()
            assert sorted(found.inputs[row, at]) == sorted(table)
            assert [table[key] for key in found.inputs[row, at].tolist()] == found.targets[row, at].tolist()
        free = ~found.scored[:, 2 * pairs :]
        assert 4000 < found.inputs[:, 2 * pairs :][free].mean() < 4200  # uniform over all ids: 4095.5
    quiet = open_task("mqar", {"between": "zero"}).examples("train", "64x4", np.arange(64))
    assert not quiet.inputs[:, 8:][~quiet.scored[:, 8:]].any()
    assert (quiet.inputs[:, 8:] > 0).sum() == quiet.scored.sum() == 4 * 64


def test_mqar_places_queries_by_the_power_law():
    """The first place drawn, of the 28 that 64x4 leaves, is i with probability ∝ i^−0.99."""
    weights = np.arange(1, 29) ** -0.99
    expected = weights / weights.sum()
    first = base.chosen(np.random.default_rng(0), 20_000, 28, 4, weights)[:, 0]
    counts = np.bincount(first, minlength=28)
    chi = ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum()
    assert chi < 27 + 4 * math.sqrt(2 * 27)  # of 27 degrees of freedom, four standard deviations
    task = open_task("mqar")
    found = task.examples("train", "64x4", np.arange(4096), 3)
    # of the task itself: the place at which its first key comes back, as published the first drawn
    places = (found.scored & (found.inputs == found.inputs[:, :1])).argmax(1)
    assert (places % 2 == 0).all()
    counts = np.bincount(places // 2 - 4, minlength=28)
    chi = ((counts - 4096 * expected) ** 2 / (4096 * expected)).sum()
    assert chi < 27 + 4 * math.sqrt(2 * 27)
    # keys are 1 to 4095 alike, in 65 bins of 63, and values the upper half, in 64 of 64
    for ids, low, width in ((found.inputs[:, 0:8:2], 1, 63), (found.inputs[:, 1:8:2], 4096, 64)):
        counts = np.bincount((ids.ravel() - low) // width)
        free, mean = 4095 // width - 1, 4 * 4096 / (4095 // width)
        assert np.square(counts - mean).sum() / mean < free + 4 * math.sqrt(2 * free)


def test_chosen_draws_without_replacement():
    """Two of three with weights 1, 2, 3: each ordered pair as its probability says, 2/6 · 1/4 for (1, 0), say."""
    found = base.chosen(np.random.default_rng(1), 60_000, 3, 2, np.array([1.0, 2.0, 3.0]))
    weights = np.array([1, 2, 3]) / 6
    expected = {(a, b): weights[a] * weights[b] / (1 - weights[a]) for a in range(3) for b in range(3) if a != b}
    chi = sum((((found == pair).all(1).sum() - 60_000 * p) ** 2) / (60_000 * p) for pair, p in expected.items())
    assert chi < 5 + 4 * math.sqrt(2 * 5)


def test_few_of_many_are_chosen_without_weights():
    """Two of five, each ordered pair alike: 20 of them, none twice the same."""
    found = base.chosen(np.random.default_rng(1), 40_000, 5, 2)
    assert (found[:, 0] != found[:, 1]).all()
    counts = np.bincount(found[:, 0] * 5 + found[:, 1], minlength=25).reshape(5, 5)[~np.eye(5, dtype=bool)]
    assert ((counts - 2000) ** 2 / 2000).sum() < 19 + 4 * math.sqrt(2 * 19)


def test_examples_that_are_drawn_together_stay_together_in_an_epoch(monkeypatch):
    blocks = []
    monkeypatch.setattr(base, "_blocks", lambda task, split, setting, block, seed: blocks.append(block) or task.block(setting, None, split))
    monkeypatch.setattr(listops.ListOps, "block", lambda self, setting, random, split: base.Examples(*[np.zeros((64, 1))] * 3))
    train = TrainConfig(ModelChoice("cram-1m"), DataChoice(task="listops"), batch_size=32)
    module = TaskDataModule(train, train.model.config())
    blocks.clear()
    for step in range(3000):  # one epoch: each block is drawn for two batches, and for no others
        module.batch(step)
    assert len(blocks) == 3000
    assert (np.bincount(blocks) == 2).all()
    assert blocks[::2] == blocks[1::2] != sorted(blocks[::2])


def test_copying_asks_for_the_string_again():
    task = open_task("copying", {"letters": 5, "shortest": 1, "longest": 6, "test": [4]})
    found = _some(task)["6"]
    for inputs, targets, scored in zip(found.inputs, found.targets, found.scored, strict=True):
        n = int(scored.sum()) - 1
        string = inputs[1 : n + 1]
        assert inputs[0] == 0
        assert inputs[n + 1] == 1
        assert np.array_equal(inputs[n + 2 : 2 * n + 2], string)
        assert np.array_equal(targets[n + 1 : 2 * n + 1], string)
        assert targets[2 * n + 1] == 2
        assert scored[n + 1 : 2 * n + 2].all()
    many = _some(task, number=6400)["6"]  # lengths alike, and letters
    for counts in (np.bincount(many.scored.sum(1) - 2, minlength=6), np.bincount(many.inputs[many.inputs > 2] - 3, minlength=5)):
        mean, free = counts.mean(), len(counts) - 1
        assert np.square(counts - mean).sum() / mean < free + 4 * math.sqrt(2 * free)
        assert free in (4, 5)
    assert (_some(task, "test")["4"].scored.sum(1) == 5).all()
    lengths = _some(open_task("copying"), number=6400)["20"].scored.sum(1) - 1
    shares = np.bincount(lengths)[5:]
    assert shares.sum() == 6400
    assert np.square(shares - 400).sum() / 400 < 15 + 4 * math.sqrt(2 * 15)  # sixteen lengths, 5 to 20, alike
    with pytest.raises(InputError, match="longest: 4; use 5, which is shortest"):
        open_task("copying", {"longest": 4})


def test_the_metric_is_the_tasks_own():
    task = open_task("mqar")
    found = task.examples("train", "64x4", np.arange(8))
    predicted = found.targets.copy()
    assert task.right(predicted, found) == (32, 32)
    predicted[~found.scored] = 7777
    at = np.argwhere(found.scored)[:5]
    predicted[tuple(at.T)] += 1
    assert task.right(predicted, found) == (27, 32)
    copying = open_task("copying")
    strings = copying.examples("train", "20", np.arange(8))
    predicted = strings.targets.copy()
    predicted[tuple(np.argwhere(strings.scored)[0])] += 1
    assert copying.right(predicted, strings) == (7, 8)


def test_judging_reads_the_asked_places_alone():
    """Nats are those of the asked places; an untrained model is at chance."""
    task = open_task("copying", {"letters": 5, "shortest": 1, "longest": 6})
    config = preset("cram-1m", d_model=8, n_layers=1, vocab_size=8)
    reader = Reader(config, init_params(config, 1), "float64")
    found = evaluate_task(reader, task, "validation", "6", 100)
    examples = task.examples("validation", "6", np.arange(100))
    logits, _ = reader.forward(examples.inputs, reader.init_state(100))
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logs, examples.targets[..., None], -1)[..., 0]
    assert found.asked == examples.scored.sum()
    assert found.nats == pytest.approx(nats[examples.scored].sum(), rel=numerics.rounding("float64", 2**12))
    assert found.examples == 100
    assert 0 <= found.score < 1


def test_judging_takes_as_many_at_once_as_the_memory_allows(monkeypatch):
    """And finds the same."""
    task = open_task("copying", {"letters": 5, "shortest": 1, "longest": 6})
    config = preset("cram-1m", d_model=8, n_layers=1, vocab_size=8)
    reader, read, found = Reader(config, init_params(config, 1), "float64"), [], []
    forward, each = reader.forward, task.length("6") * 4 * config.d_model
    monkeypatch.setattr(reader, "forward", lambda tokens, state: read.append(len(tokens)) or forward(tokens, state))
    for memory, chunk in ((task_datamodule.SHARE * (4 * each - 1), 3), (1 << 60, 9), (1, 1)):
        monkeypatch.setattr(task_datamodule, "memory", lambda memory=memory: memory)
        found.append(evaluate_task(reader, task, "validation", "6", 9))
        assert set(read) == {chunk}
        read.clear()
    assert [one.right for one in found] == [found[0].right] * 3
    assert [one.nats for one in found] == pytest.approx([found[0].nats] * 3, rel=numerics.rounding("float64", 2**12))
    monkeypatch.setattr(task_datamodule, "MOST", 2 * each)
    monkeypatch.setattr(task_datamodule, "memory", lambda: 1 << 60)
    evaluate_task(reader, task, "validation", "6", 4)
    assert read == [2, 2]


def test_options_that_do_not_fit():
    for options, said in (
        ({"vocabulary": 7}, "vocabulary: 7; use an even"),
        ({"train": ["64x20"]}, "shares"),
        ({"test": ["64x20"]}, "test: 64x20; T is even and four times"),
        ({"test": ["64"]}, "'64'; write two positive integers"),
        ({"train": [], "shares": []}, "train: empty; give one setting"),
        ({"train": ["64x4", "8x1", "64x4"], "shares": [1, 1, 2]}, "train: 64x4 comes twice in .*; give each setting once"),
        ({"powr": 1}, "powr: no such field; did you mean 'power'"),
        ({"power": 0}, "power: 0"),
    ):
        with pytest.raises(InputError, match=said):
            open_task("mqar", options)
    for name, field, values in (("phonebook", "train", [5, 10, 5]), ("dna", "train", [64, 64]), ("copying", "test", [20, 50, 20])):
        with pytest.raises(InputError, match=f"{field}: {values[0]} comes twice in .*; give each setting once"):
            open_task(name, {field: values})
    with pytest.raises(InputError, match=r"64 examples of copying 1000000000000.*choose shorter ones"):
        open_task("copying", {"longest": 10**12}).examples("train", "1000000000000", np.arange(1))
    with pytest.raises(InputError, match=r"data\.task: 'mqra' is unknown; did you mean 'mqar'"):
        open_task("mqra")
