"""ListOps, Pathfinder and the phone book are what their published rules say, by other means than the generators'."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from PIL import Image
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_tools.tasks import open_task, pathfinder


def _chi(counts, expected):
    """χ² over its degrees of freedom, in standard deviations from their number."""
    expected = np.asarray(expected, float)
    return (((counts - expected) ** 2 / expected).sum() - (len(expected) - 1)) / (2 * (len(expected) - 1)) ** 0.5


def _parse(tokens, depth=1):
    """One node of a list → its value, the tokens that are left, the deepest node, operators with their numbers of arguments."""
    first, rest = tokens[0], tokens[1:]
    if first < 10:
        return first, rest, depth, []
    values, deepest, seen = [], depth, []
    while rest[0] != 14:
        value, rest, low, more = _parse(rest, depth + 1)
        values.append(value)
        deepest, seen = max(deepest, low), seen + more
    result = {10: min, 11: max, 12: lambda v: int(statistics.median(v)), 13: lambda v: sum(v) % 10}[first](values)
    return result, rest[1:], deepest, [*seen, (first, len(values))]


def test_listops_follows_its_rules():
    task = open_task("listops")
    assert (task.size("train", "lists"), task.size("test", "lists"), task.vocab_size) == (96_000, 2_000, 15)
    found = task.examples("train", "lists", np.arange(64), 3)
    assert found.valid is not None
    operators, arguments, texts, digits = np.zeros(4), np.zeros(9), set(), np.zeros(10)
    for inputs, valid, targets, scored in zip(found.inputs, found.valid, found.targets, found.scored, strict=True):
        tokens = inputs[valid].tolist()
        assert 500 < len(tokens) < 2000
        value, left, deepest, seen = _parse(tokens)
        assert not left
        assert value == targets[scored][0]
        assert np.flatnonzero(scored).tolist() == [len(tokens) - 1]
        assert deepest <= 10
        for operator, number in seen:
            operators[operator - 10] += 1
            arguments[number - 2] += 1
        digits += np.bincount([t for t in tokens if t < 10], minlength=10)
        texts.add(tuple(tokens))
    assert len(texts) == 64
    # four operators alike, digits alike; long trees have more arguments than a node of any tree
    assert _chi(operators, [operators.sum() / 4] * 4) < 5
    assert _chi(digits, [digits.sum() / 10] * 10) < 5
    assert (arguments > 0).all()
    labels = task.examples("train", "lists", np.arange(256), 4)
    share = np.bincount(labels.targets[labels.scored], minlength=10) / 256
    assert share.min() > 0.02
    assert share.max() < 0.25  # the majority's share, which a model must beat: 0 and 9, of MIN and MAX
    small = open_task("listops", {"max_depth": 3, "max_args": 3, "min_length": 3, "max_length": 12}).examples(
        "train", "lists", np.arange(64)
    )
    assert small.valid is not None
    assert small.valid.sum(1).max() == 11


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_depth": 1}, "max_depth: 1; use an integer ≥ 2"),
        ({"min_length": 10**9, "max_length": 2 * 10**9, "max_depth": 2}, "min_length: 1000000000; no tree"),
    ],
)
def test_listops_that_cannot_be(options, said):
    with pytest.raises(InputError, match=said):
        open_task("listops", options)


def test_a_phone_book_has_the_number():
    task = open_task("phonebook")
    for setting in ("5", "20"):
        found = task.examples("train", setting, np.arange(64), 3)
        asked = []
        assert found.valid is not None
        for inputs, valid, targets, scored in zip(found.inputs, found.valid, found.targets, found.scored, strict=True):
            text = bytes(inputs[valid].astype(np.uint8)).decode() + chr(targets[scored][-1])
            lines = text.split("\n")
            book = dict(line.split(": ") for line in lines[: int(setting)])
            assert len(book) == int(setting)
            assert len(lines) == int(setting) + 3
            assert len({line.split(": ")[0] for line in lines[int(setting) :]}) == 3
            assert all(book[name] == number for name, number in (line.split(": ") for line in lines[int(setting) :]))
            name, number = lines[-1].split(": ")
            assert number == "".join(map(chr, targets[scored]))
            assert len(number) == 10
            asked.append(list(book).index(name))
        assert _chi(np.bincount(asked, minlength=int(setting)), [64 / int(setting)] * int(setting)) < 5
    wrong = found.targets.copy()
    wrong[0, np.flatnonzero(found.scored[0])[0]] += 1
    assert task.right(wrong, found) == (63, 64)


def test_pathfinder_draws_two_discs_and_a_fair_coin():
    task = open_task("pathfinder")
    assert (task.length("images"), task.size("train", "images"), task.size("test", "images")) == (1024, 160_000, 20_000)
    found = task.examples("train", "images", np.arange(16), 3)
    labels = found.targets[found.scored]
    assert 2 <= labels.sum() <= 14  # of 16; outside with a probability of 5e-4
    for row in found.inputs:
        image = row.reshape(32, 32)
        bright = int((image > 230).sum())
        assert 6 <= bright <= 40  # two discs of radius 1.5
        drawn = (image > 40).mean()
        assert 0.08 < drawn < 0.45
    large = open_task("pathfinder", {"side": 128})
    assert large.length("images") == 16_384


def test_pathfinders_markers_stand_at_the_ends_that_the_class_says():
    """From the canvas itself: starts lie `apart`, each contour has 14 paddles, each near the one before it, and none crosses another."""
    style = pathfinder.STYLES[32]
    canvas = None
    for seed in range(20):
        canvas = pathfinder._Canvas(style, 32, np.random.default_rng(seed))
        contours = canvas.contours()
        if contours is not None:
            break
    assert canvas is not None
    assert contours is not None
    assert len(canvas.paddles) == 2 * 14
    (a, _), (b, _) = contours
    limit = numerics.rounding("float64", 2**10)  # few operations on places up to 2⁷ from lengths of about 1
    judge.same(np.hypot(a[0] - b[0], a[1] - b[1]), np.float64(style.apart * style.scale), limit=limit)
    for first in (0, 14):
        chain = canvas.paddles[first : first + 14]
        for before, after in itertools.pairwise(chain):
            gap = np.hypot(after[0] - before[2], after[1] - before[3])
            judge.same(gap, np.float64(style.margin * style.scale), limit=limit)
            heading = np.arctan2(before[2] - before[0], before[3] - before[1]) - np.arctan2(after[2] - after[0], after[3] - after[1])
            assert np.cos(heading) > np.cos(np.pi / 2 / style.continuity)  # turns by less than that


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
