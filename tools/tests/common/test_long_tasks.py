"""ListOps, Pathfinder and the phone book are what their published rules say, by other means than the generators'."""

from __future__ import annotations

import dataclasses
import random
import statistics

import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_tools.tasks import open_task, pathfinder, phonebook


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


def _tree(dice, depth=1):
    """Value and length of a tree, grown node by node as the published rules have it."""
    if depth == 10 or dice.random() > 0.25:
        return dice.randrange(10), 1
    below = [_tree(dice, depth + 1) for _ in range(dice.randint(2, 10))]
    values = [value for value, _ in below]
    of = dice.choice((min, max, lambda v: int(np.median(v)), lambda v: sum(v) % 10))
    return of(values), 2 + sum(length for _, length in below)


def test_listops_has_the_lengths_and_answers_of_trees_grown_one_by_one():
    mine, its = [], open_task("listops").examples("train", "lists", np.arange(512), 3)
    dice = random.Random(3)
    while len(mine) < 512:
        value, length = _tree(dice)
        if 500 < length < 2000:
            mine.append((length, value))
    assert its.valid is not None
    lengths, answers = np.array(mine).T
    for one, other, bins in (
        (lengths, its.valid.sum(1), np.quantile(lengths, np.arange(1, 8) / 8)),
        (answers, its.targets[its.scored], np.arange(1, 10) - 0.5),
    ):
        a, b = (np.bincount(np.digitize(found, bins), minlength=len(bins) + 1) for found in (one, other))
        free = len(bins)  # of two samples of one law
        assert (((a - b) ** 2 / (a + b)).sum() - free) / (2 * free) ** 0.5 < 4


def test_listops_grows_by_its_law():
    """Lists of any length, of lists of digits: each has 2, 3 or 4 arguments alike, of which a quarter are lists where they may be."""
    task = open_task("listops", {"max_depth": 3, "max_args": 4, "min_length": 1, "max_length": 1000})
    found = task.examples("train", "lists", np.arange(640), 3)
    assert found.valid is not None
    arguments, roots, inner = np.zeros(3), 0, 0
    for inputs, valid in zip(found.inputs, found.valid, strict=True):
        *below, (_, number) = _parse(inputs[valid].tolist())[3]  # the root is the last
        roots, inner = roots + number, inner + len(below)
        for count in (number, *(n for _, n in below)):
            arguments[count - 2] += 1
    assert _chi(arguments, [arguments.sum() / 3] * 3) < 4
    assert _chi(np.array([inner, roots - inner]), [roots / 4, 3 * roots / 4]) < 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_depth": 1}, "max_depth: 1; use an integer ≥ 2"),
        ({"max_args": 101}, "max_args: 101; use an integer from 2 to 100"),
        ({"max_args": 3}, "min_length: 500; hardly any tree is longer, .* with max_args 3 and max_depth 10; lower it"),
        ({"max_args": 3, "max_depth": 10**9}, "min_length: 500; hardly any tree is longer"),
        ({"min_length": 10**9, "max_length": 2 * 10**9, "max_depth": 2}, "min_length: 1000000000; no tree"),
    ],
)
def test_listops_that_cannot_be(options, said):
    with pytest.raises(InputError, match=said):
        open_task("listops", options).examples("train", "lists", np.arange(1))


def test_a_phone_book_has_the_number():
    task = open_task("phonebook")
    for setting in ("5", "20"):
        found = task.examples("train", setting, np.arange(64), 3)
        asked, people, digits = [], np.zeros((2, 84)), np.zeros(10)
        assert found.valid is not None
        for inputs, valid, targets, scored in zip(found.inputs, found.valid, found.targets, found.scored, strict=True):
            text = bytes(inputs[valid].astype(np.uint8)).decode() + chr(targets[scored][-1])
            lines = text.split("\n")
            book = dict(line.split(": ") for line in lines[: int(setting)])
            assert len(book) == int(setting)
            assert len(lines) == int(setting) + 3
            assert len({line.split(": ")[0] for line in lines[int(setting) :]}) == 3
            assert all(book[name] == number for name, number in (line.split(": ") for line in lines[int(setting) :]))
            for name, number in book.items():
                first, last = name.split(" ")
                people[[0, 1], [phonebook.FIRST.index(first), phonebook.LAST.index(last)]] += 1
                digits += np.bincount(np.frombuffer(number.encode(), np.uint8) - 48, minlength=10)
            name, number = lines[-1].split(": ")
            assert number == "".join(map(chr, targets[scored]))
            assert len(number) == 10
            asked.append(list(book).index(name))
        assert _chi(np.bincount(asked, minlength=int(setting)), [64 / int(setting)] * int(setting)) < 5
        assert _chi(digits, [digits.sum() / 10] * 10) < 4
        for counts, names in zip(people, (phonebook.FIRST, phonebook.LAST), strict=True):
            assert _chi(counts[: len(names)], [counts.sum() / len(names)] * len(names)) < 4
    wrong = found.targets.copy()
    wrong[0, np.flatnonzero(found.scored[0])[0]] += 1
    assert task.right(wrong, found) == (63, 64)


def test_a_phone_book_may_have_its_examples_asked_in_training():
    """The same books; of all three lines behind them the numbers, but where it is judged."""
    one, all_three = open_task("phonebook"), open_task("phonebook", {"learn": "numbers"})
    for split, setting, asked in (("train", "5", 3), ("validation", "5", 1), ("test", "20", 1)):
        last, found = (task.examples(split, setting, np.arange(64), 3) for task in (one, all_three))
        assert (last.inputs == found.inputs).all()
        assert (last.scored <= found.scored).all()
        assert found.valid is not None
        for inputs, targets, scored, end in zip(found.inputs, found.targets, found.scored, found.valid.sum(1), strict=True):
            text = bytes(inputs[:end].astype(np.uint8)).decode() + chr(targets[end - 1])
            numbers = "".join(line.split(": ")[1] for line in text.split("\n")[-asked:])
            assert "".join(map(chr, targets[scored])) == numbers
            assert (targets[:end][scored[:end]] == np.append(inputs[1:end], targets[end - 1])[scored[:end]]).all()
    with pytest.raises(InputError, match="learn: 'digits' is not valid; Valid: number, numbers"):
        open_task("phonebook", {"learn": "digits"})


def _drawn(monkeypatch, side, number):
    """Images by the generator: picture, class, margin, the two contours, distractors, places of the discs, all in pixels."""
    seen, image = [], pathfinder.Canvas.image

    def noted(canvas, long, short, markers):
        seen.append((canvas.margin, long.reshape(2, 14, 4) - canvas.edge, short - canvas.edge, markers - canvas.edge))
        return image(canvas, long, short, markers)

    monkeypatch.setattr(pathfinder.Canvas, "image", noted)
    random = np.random.default_rng(side)
    drawn = [pathfinder.draw(pathfinder.STYLES[side], side, random) for _ in range(number)]
    return [(*one, *other) for one, other in zip(drawn, seen, strict=True)]


def _distances(a, b):
    """Between paddles [N, 4] and [M, 4], by 21 points of each: [N, M]."""
    share = np.linspace(0, 1, 21)[:, None]
    one, other = (p[:, None, :2] * (1 - share) + p[:, None, 2:] * share for p in (a, b))
    return np.hypot(*np.moveaxis(one[:, None, :, None] - other[None, :, None], -1, 0)).min((2, 3))


def _turns(before, after):
    """Angles by which paddles [N, 4] turn from those before them."""
    one, other = (np.arctan2(p[:, 2] - p[:, 0], p[:, 3] - p[:, 1]) for p in (before, after))
    return np.angle(np.exp(1j * (other - one)))


@pytest.mark.parametrize(("side", "number"), [(32, 12), (128, 6)])
def test_pathfinder_is_what_its_rules_say(monkeypatch, side, number):
    """Geometry of contours and discs, to within the rounding of places to pixels; whether two discs lie on one contour is traced."""
    style, limit = pathfinder.STYLES[side], numerics.rounding("float64", 2**12)  # few operations on places up to 2⁷ from lengths of about 1
    published = {32: (1, (1,), 2, 0.5, 1.5, 1.0, 1.5, 2.0, 7, 5, 4, 4), 128: (1, (2, 3), 5, 1.5, 3, 1.8, 0.9, 0.9, 20, 8, 4, 8)}
    assert dataclasses.astuple(style)[:-1] == published[side]
    margins, numbers, own = set(), [], []
    for image, label, margin, contours, short, markers in _drawn(monkeypatch, side, number):
        margins.add(margin)
        numbers.append(len(short))
        own.append((markers[0] == contours[1, 0, :2]).all())
        first, second = contours[:, 0]
        assert 2 * style.apart <= first.min()
        assert first.max() <= side - 1 - 2 * style.apart
        assert (style.apart - 1) ** 2 < np.square(first[:2] - second[:2]).sum() < (style.apart + 1) ** 2
        everything = np.concatenate([contours.reshape(28, 4), short])
        judge.same(np.hypot(*(everything[:, 2:] - everything[:, :2]).T), np.full(len(everything), float(style.paddle)), limit=limit)
        assert min(everything.min(), side - 1 - everything.max()) > style.padding + margin - 1
        gaps, turns = [], []
        for contour in contours:
            turns += (of := _turns(contour[:-1], contour[1:])).tolist()
            gaps += (np.hypot(*(contour[1:, :2] - contour[:-1, 2:]).T) - 2 * margin * np.cos(of / 2)).tolist()
        assert max(map(abs, turns)) < np.pi / 2 / style.continuity
        # between paddles are two margins, but for the rounding of a pivot and of a head
        assert np.square(gaps).max() < 2
        assert np.square(np.mean(gaps)) < 1 / 4
        # no two are nearer than two margins and a thickness, to within a pixel's half diagonal, but for neighbours in a contour
        near = _distances(everything, everything) < 2 * margin + style.thickness - np.sqrt(0.5)
        assert not (near & (np.abs(np.subtract.outer(range(len(near)), range(len(near)))) > 1)).any()
        # from the disc at a start: what follows a paddle points away from a place a margin beyond it
        ahead = (everything[:, 2:] - everything[:, :2]) / style.paddle
        (at,) = np.flatnonzero((everything[:, :2] == markers[0]).all(1))
        for _ in range(13):
            pivot = everything[at, 2:] + margin * ahead[at]
            at = np.square(everything[:, :2] - margin * ahead - pivot).sum(1).argmin()
        assert (everything[at, 2:] == markers[1]).all() == label
        # squares of three pixels are brightest where the discs are
        light = np.lib.stride_tricks.sliding_window_view(np.pad(image, 1), (3, 3)).mean((2, 3))
        far = np.square(np.argwhere(image >= 0)[:, None] - markers).sum(-1).min(1) > (style.marker + 2) ** 2
        assert light[tuple(np.rint(markers).astype(int).T)].min() > light[far.reshape(image.shape)].max()
        assert image.max() == 255
    assert margins == set(style.margins)
    # all distractors, of which 32 pixels have room for a part; the first disc is on either contour
    assert {32: 0.6, 128: 1}[side] <= max(numbers) / (style.distractors * style.links + style.singles) <= 1
    assert 0 < sum(own) < number


@pytest.mark.parametrize(("side", "ratio"), [(32, 3 / 4), (128, 1.0)])
def test_pathfinder_lights_contours_beside_distractors(side, ratio):
    style = pathfinder.STYLES[side]
    canvas = pathfinder.Canvas(style, side, style.margins[0], np.random.default_rng(0))
    paddle = canvas.edge + np.array([[8, 8, 8, 8 + style.paddle]])
    image = canvas.image(paddle, paddle + np.array([12, 0, 12, 0]), canvas.edge + np.array([[26.0, 26.0], [26.0, 26.0]])).astype(float)
    contour, distractor = image[:14, :20].max(), image[14:24, :20].max()
    assert round(8 * contour / distractor) == 8 * ratio


@pytest.mark.parametrize("side", [32, 128])
def test_pathfinder_turns_by_its_law(side):
    """Where there is room a paddle's head is a pixel of a circle, with weight cos² cθ for a turn by θ, none beyond 90°/c."""
    style, number = pathfinder.STYLES[side], 4000
    canvas = pathfinder.Canvas(style, side, style.margins[-1], np.random.default_rng(side))
    reach, heads = style.paddle + style.margins[-1], canvas.shapes.heads
    # every pixel whose middle is within a quarter of the circle, and none beyond half a diagonal
    y, x = np.mgrid[-2 * reach : 2 * reach + 1, -2 * reach : 2 * reach + 1]
    radii = 4 * np.sqrt(y**2 + x**2)
    inner, outer = (radii > 4 * reach - 1) & (radii < 4 * reach + 1), np.square(radii - 4 * reach) <= 8
    mine = {(int(a), int(b)) for a, b in heads}
    assert {(int(a), int(b)) for a, b in zip(y[inner], x[inner], strict=True)} <= mine
    assert mine <= {(int(a), int(b)) for a, b in zip(y[outer], x[outer], strict=True)}
    for last in (0, len(heads) // 3):
        middle = np.full((number, 2), canvas.edge + side // 2)
        found, fits = canvas.following(np.c_[middle, np.full(number, last)], canvas.taken[None], np.zeros(number, int))
        assert fits.all()
        before, after = (np.arctan2(*heads[i].T) for i in (last, slice(None)))
        turn = style.continuity * np.abs(np.angle(np.exp(1j * (after - before))))
        law = np.maximum(np.cos(np.minimum(turn, np.pi)), 0) ** 2
        counts, expected = np.bincount(found[:, 2], minlength=len(heads)), number * law / law.sum()
        assert not counts[law == 0].any()
        many = expected > 5
        assert many.sum() > 4
        assert _chi(counts[many], expected[many]) < 4


def test_pathfinder_is_a_fair_coin():
    task = open_task("pathfinder")
    assert (task.length("images"), task.size("train", "images"), task.size("test", "images")) == (1024, 160_000, 20_000)
    found = task.examples("train", "images", np.arange(16), 3)
    assert 2 <= found.targets[found.scored].sum() <= 14  # of 16; outside with a probability of 5e-4
    assert open_task("pathfinder", {"side": 128}).length("images") == 16_384
