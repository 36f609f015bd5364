"""Choosing the next token: ties, probabilities, infinities, temperatures, bad arguments."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import InputError
from unisono_spec.contract.sampling import GREEDY, NEAR_TIE, Sampling, choose, uniform

ALWAYS = [
    [[6, 4, 13], [6, 4, 13], [6, 4, 13]],
    [[6, 7, 13], [6, 4, 13], [6, 4, 13]],
    [[5, 2, 13], [7, 4, 5], [6, 16, 14]],
    [[6, 4, 13], [6, 2, 14], [6, 4, 14]],
    [[7, 16, 7], [0, 1, 14], [2, 7, 14]],
]


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    ids, ties = choose(np.array([[1.0, 3.0, 3.0, 0.0], [5.0, 1.0, 0.0, 0.0]]), GREEDY, 0)
    assert ids.tolist() == [1, 0]
    assert ties.tolist() == [True, False]


def test_a_repetition_penalty_by_hand() -> None:
    """Seen ids: 2.0 / 1.25 = 1.6 falls below 1.75, −1 · 1.25 = −1.25 below −1.2; 0 and what is not seen stay."""
    logits = np.array([[2.0, 1.75, -1.0, -1.2, 0.0], [-2.0, -2.2, -np.inf, -3.0, -9.0]])
    seen = np.array([[True, False, True, False, True], [True, False, True, False, False]])
    penalty = Sampling(repetition_penalty=1.25)
    assert choose(logits, GREEDY, 0, seen)[0].tolist() == [0, 0]
    assert choose(logits, penalty, 0, seen)[0].tolist() == [1, 1]
    assert choose(logits, penalty, 0)[0].tolist() == [0, 0]
    # drawn: softmax of 1.6, 1.75, −1.25, −1.2, 0, whose second has p = e^1.75 / (e^1.6 + e^1.75 + e^−1.25 + e^−1.2 + 1)
    warm = Sampling(temperature=1.0, repetition_penalty=1.25, seed=4)
    drawn = np.array([choose(logits[:1], warm, n, seen[:1])[0][0] for n in range(4000)])
    exact = np.exp([1.6, 1.75, -1.25, -1.2, 0.0])
    assert (np.abs(np.bincount(drawn, minlength=5) / 4000 - exact / exact.sum()) <= numerics.sampling(4000) / 2).all()
    # a penalty never forbids, nor allows what is forbidden
    large = np.array([[-1e308, -np.inf, -1.7e308]])
    assert choose(large, Sampling(repetition_penalty=9.0), 0, np.ones((1, 3), bool))[0].tolist() == [0]
    assert choose(np.array([[np.inf, 3.0]]), penalty, 0, np.ones((1, 2), bool))[0].tolist() == [0]
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=r"repetition_penalty: .*; use 1 for none"):
            Sampling(repetition_penalty=value)


def test_sampling_follows_its_distribution_and_its_seed() -> None:
    logits = np.log(np.array([[0.1, 0.2, 0.7]]))
    drawn = np.array([choose(logits, Sampling(temperature=1.0, seed=3), n)[0][0] for n in range(4000)])
    again = np.array([choose(logits, Sampling(temperature=1.0, seed=3), n)[0][0] for n in range(50)])
    assert drawn[:50].tolist() == again.tolist()
    counts = np.bincount(drawn, minlength=3) / len(drawn)
    # five standard deviations of a share of 4000 draws
    assert (np.abs(counts - [0.1, 0.2, 0.7]) <= numerics.sampling(4000) / 2).all()
    only = {int(choose(logits, Sampling(temperature=1.0, top_k=2), n)[0][0]) for n in range(200)}
    assert only == {1, 2}
    assert {int(choose(logits, Sampling(temperature=1.0, top_p=0.5), n)[0][0]) for n in range(50)} == {2}


BAD = {
    "temperature": (-1.0, math.nan, math.inf, 10**400, "1", None, True, 1j, np.bool_(True), [0.5]),
    "top_k": (-1, 2.0, "3", None, True, np.float64(2)),
    "top_p": (0.0, -0.5, 1.5, math.nan, "1", None, True),
    "seed": (-1, 2**64, 1.0, "0", None, True, 10**400),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_sampling_is_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{field}: .*; (use|give) "):
        Sampling(**{field: value})  # pyright: ignore[reportArgumentType]


def test_numbers_of_other_libraries_are_numbers() -> None:
    given = Sampling(np.float16(0.5), np.int64(3), np.float32(0.25), np.uint64(2**64 - 1))  # pyright: ignore[reportArgumentType]
    assert given == Sampling(Fraction(1, 2), 3, 0.25, 2**64 - 1)  # pyright: ignore[reportArgumentType]
    assert choose(np.zeros((2, 5)), given, 0)[0].shape == (2,)


def test_logits_that_cannot_be_drawn_from_are_refused() -> None:
    for logits, message in (
        ([[0.0, math.nan]], "NaN at generated token 5"),
        ([[0.0, 1.0], [-math.inf, -math.inf]], "-inf alone"),
        ([0.0, 1.0], r"shape \(2,\)"),
        ([[]], r"shape \(1, 0\)"),
    ):
        for sampling in (GREEDY, Sampling(1.0)):
            with pytest.raises(InputError, match=message):
                choose(np.array(logits), sampling, 5)


INF = math.inf
WAYS = {
    "greedy": GREEDY,
    "warm": Sampling(0.8),
    "top_k": Sampling(0.8, top_k=2),
    "top_p": Sampling(0.8, top_p=0.5),
    "hot": Sampling(1e308),
    "cold": Sampling(1e-308),
    "coldest": Sampling(5e-324),
    "least": Sampling(1.0, top_k=1, top_p=5e-324),
}
WAY = pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)


@WAY
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_infinite_logits(sampling: Sampling, dtype: type) -> None:
    """+inf is the best, several share, −inf is never drawn. Warnings are errors."""
    rows = np.array([[0, INF, 1, -INF], [INF, 0, -INF, INF], [-INF, -INF, 3, -INF]], dtype)
    drawn = np.array([choose(rows, sampling, n)[0] for n in range(200)])
    assert set(drawn[:, 0]) == {1}
    assert set(drawn[:, 2]) == {2}
    one = sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0.5  # half of it is the first of two
    assert set(drawn[:, 1]) == ({0} if one else {0, 3})
    if not one:  # five standard deviations of a share of 200 draws
        assert abs((drawn[:, 1] == 0).mean() - 0.5) <= numerics.sampling(200) / 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-200, 1e-308, 5e-324])
def test_a_temperature_near_0_draws_the_best(temperature: float) -> None:
    top = np.finfo(np.float64).max
    rows = np.array([[0.0, 1.0, 3.0, 2.0], [-5.0, -9.0, -7.0, -6.0], [-top, top, 0.0, top / 2], [0.0, 0.0, -1.0, -1.0]])
    drawn = np.array([choose(rows, Sampling(temperature), n)[0] for n in range(100)])
    assert [set(ids) for ids in drawn.T] == [{2}, {0}, {1}, {0, 1}]


def test_an_infinite_temperature_or_spread_leaves_probabilities() -> None:
    rows = np.array([[0.0, 1.0], [1e308, -1e308]])
    drawn = np.array([choose(rows, Sampling(1e308), n)[0] for n in range(400)])
    share = 1 / (1 + np.exp([0.0, 2.0]))
    assert (np.abs((drawn == 1).mean(0) - share) <= numerics.sampling(400, np.sqrt(share * (1 - share)))).all()


def test_near_ties_are_judged_by_what_can_be_drawn() -> None:
    rows = np.array(
        [[0, 2, -INF], [2, 0, 2], [0, 2, 2 - 1e-6], [0, 2, 2 - 1e-3], [-INF, 1, -INF], [INF, 0, 1], [INF, INF, 1], [-1e308, 1e308, 0]]
    )
    assert choose(rows, GREEDY, 0)[1].tolist() == [False, True, True, False, False, False, True, False]
    assert not choose(np.array([[7.0]]), GREEDY, 0)[1].any()
    for only in (Sampling(1.0), Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.1)):
        drawn = np.array([choose(np.array([[-INF, 1.0, -INF]]), only, n)[1] for n in range(2000)])
        assert not drawn.any()
    few = np.array([choose(np.array([[0.0, 1.0, -INF, 0.5]]), Sampling(1.0), n)[1] for n in range(2000)])
    assert few.mean() < 0.01


def test_the_margin_of_near_ties_covers_sums_of_long_texts() -> None:
    """2^17 numbers added one by one in float32: what two logits of two such states may be off together is a near-tie, and not by far."""
    given = np.random.default_rng(0).random((2**17, 64), np.float32)
    off = np.cumsum(given, 0, dtype=np.float32)[-1] / given.sum(0, dtype=np.float64) - 1
    assert NEAR_TIE / 100 < 4 * np.sqrt(np.square(off).mean()) < NEAR_TIE


@pytest.mark.parametrize("top_k", [0, 7])
def test_ids_that_rounding_could_exchange_are_near_ties(top_k: int) -> None:
    """Each logit twice, but for 1e-6, which another rounding turns; and few draws are told in vain."""
    apart = 3 * np.random.default_rng(1).standard_normal((400, 20))
    one, other = (np.concatenate([apart + by, apart - by], 1) for by in (1e-6, -1e-6))
    law = Sampling(1.0, top_k=top_k)
    (ids, ties), (others, _) = choose(one, law, 0), choose(other, law, 0)
    assert (ids != others).mean() > 0.5
    assert ties[ids != others].all()
    assert choose(apart, law, 0)[1].mean() < 0.01


def test_where_top_p_cuts_within_rounding_is_a_near_tie() -> None:
    """0.5 + 0.3 are enough of 0.8, or not quite; what is drawn below both cuts' edges stays what it is, and is none."""
    rows = np.log(np.tile([0.5, 0.3, 0.2], (3000, 1)))
    (ids, ties), (others, again) = (choose(rows, Sampling(1.0, top_p=0.8 + by), 0) for by in (-1e-7, 1e-7))
    assert 0 < (ids != others).mean() < 0.5
    assert ties[ids != others].all()
    assert again[ids != others].all()
    assert 0.3 < ties.mean() < 0.6


def test_finite_logits_draw_what_they_always_drew() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (3, 17))
    ways = (GREEDY, Sampling(0.7, seed=5), Sampling(1.3, 5, 1.0, 2**63), Sampling(1.0, 0, 0.6, 1), Sampling(2.0, 9, 0.9, 12))
    assert [[choose(logits, way, n)[0].tolist() for n in (0, 1, 7)] for way in ways] == ALWAYS


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_every_seed_draws(seed: int) -> None:
    drawn = [choose(np.zeros((2, 9)), Sampling(1.0, seed=seed), n)[0].tolist() for n in range(8)]
    assert len({tuple(ids) for ids in drawn}) > 1


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_many_numbers_are_those_drawn_one_by_one(seed: int) -> None:
    for count in (1, 3):  # few, and more than `FEW`
        found = uniform(seed, 3, 2**32 - 4, count)
        assert found.shape == (count, 3)
        for (i, row), value in np.ndenumerate(found):
            key = np.array([seed, (row << 32) | (2**32 - 4 + i)], dtype=np.uint64)
            assert value == np.random.Generator(np.random.Philox(key=key)).random()
