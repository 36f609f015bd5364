"""Witten–Bell against a direct reading of its formula, and xz against its own size."""

from __future__ import annotations

import lzma
import math

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import InputError
from unisono_tools.experiments.ngrams import witten_bell, xz

TRAIN = np.frombuffer(b"the cat sat on the mat, the rat sat on the cat; a bat spat at that." * 3, np.uint8)
HELD_OUT = np.frombuffer(b"that cat spat on the bat \xff on the mat", np.uint8)


def probability(history: bytes, byte: int) -> float:
    """The formula, by counting."""
    text = TRAIN.tobytes()
    shorter = probability(history[1:], byte) if history else 1 / 256
    followers = [text[i + len(history)] for i in range(len(text) - len(history)) if text[i : i + len(history)] == history]
    types = len(set(followers))
    return (followers.count(byte) + types * shorter) / (len(followers) + types) if followers else shorter


def test_it_is_the_formula():
    held = HELD_OUT.tobytes()
    for order, bits in enumerate(witten_bell(TRAIN, HELD_OUT, 5)):
        expected = [-math.log2(probability(held[max(0, t - order) : t], held[t])) for t in range(1, len(held))]
        assert bits == pytest.approx(np.mean(expected), rel=numerics.rounding("float64", 2**12))


@pytest.mark.parametrize("history", [b"", b"a", b"th", b"xyz", b" the "])
def test_probabilities_sum_to_one(history):
    assert sum(probability(history, byte) for byte in range(256)) == pytest.approx(1, rel=numerics.rounding("float64", 2**12))


def test_what_was_never_seen_costs_a_finite_number_of_bits():
    assert all(np.isfinite(witten_bell(TRAIN, np.arange(256, dtype=np.uint8), 7)))


def test_short_texts_are_refused():
    with pytest.raises(InputError, match="too few"):
        witten_bell(TRAIN[:3], HELD_OUT, 5)
    with pytest.raises(InputError, match="orders: 8"):
        witten_bell(TRAIN, HELD_OUT, 8)


def test_xz():
    size = len(lzma.compress(HELD_OUT.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    assert xz(HELD_OUT) == 8 * size / len(HELD_OUT)
    assert xz(HELD_OUT, primed_with=TRAIN) < xz(HELD_OUT)
