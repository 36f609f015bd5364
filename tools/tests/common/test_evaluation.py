"""Held-out loss: streaming equals reading at once, and each head's nats equal their definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError, init_params, preset
from unisono_tools import evaluation
from unisono_tools.backends.numpy import Reader
from unisono_tools.evaluation import Score, default_window, evaluate, nll

SUMS = numerics.rounding("float64", 2**12)  # no longer chain of roundings leads to a loss here


def _reader(name: str, **changes) -> Reader:
    config = preset(name, **changes)
    return Reader(config, init_params(config, 1), "float64")


def test_streamed_equals_at_once(monkeypatch):
    reader = _reader("cram-1m", d_model=8, n_layers=2)
    ids = np.random.default_rng(0).integers(0, 256, 50)
    whole = evaluate(reader, ids)
    logits, _ = reader.forward(ids[None, :-1], reader.init_state(1))
    shifted = logits[0] - logits[0].max(-1, keepdims=True)
    definition = -np.log((np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True))[np.arange(49), ids[1:]])
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    parts = evaluate(reader, ids)
    assert whole.targets == parts.targets == 49
    assert parts.nats == pytest.approx(whole.nats, rel=SUMS)
    assert whole.nats == pytest.approx(definition.sum(), rel=SUMS)
    assert whole.bits == pytest.approx(math.log2(whole.perplexity), rel=SUMS)


def test_windows_start_anew(monkeypatch):
    reader = _reader("cram-demo", d_model=8, n_layers=1)
    ids = np.random.default_rng(0).integers(0, 256, 41)
    separate = sum(evaluate(reader, ids[start : start + 11]).nats for start in range(0, 40, 10))
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    assert evaluate(reader, ids, window=10).nats == pytest.approx(separate, rel=SUMS)
    assert evaluate(reader, ids).nats != pytest.approx(separate, rel=numerics.mistake())
    # one that is longer than the text needs no more room than the text
    softmax = _reader("transformer-1m", d_model=8, n_layers=1, head_width=8)
    assert evaluate(softmax, ids, window=10**11) == evaluate(softmax, ids)


@pytest.mark.parametrize("window", [0, 10])
def test_documents_start_anew_wherever_chunks_end(window, monkeypatch):
    reader, documents = _reader("cram-demo", d_model=8, n_layers=1), np.array([0, 9, 17, 30])
    ids = np.random.default_rng(0).integers(0, 256, 41)
    starts = sorted({*documents.tolist(), *(range(0, 40, window) if window else ())})
    separate = sum(evaluate(reader, ids[a : b + 1]).nats for a, b in itertools.pairwise([*starts, 40]))
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    assert evaluate(reader, ids, window=window, documents=documents).nats == pytest.approx(separate, rel=SUMS)


def test_limit():
    reader = _reader("cram-demo", d_model=8, n_layers=1)
    ids = np.random.default_rng(0).integers(0, 256, 41)
    assert evaluate(reader, ids, limit=10) == evaluate(reader, ids[:11])
    assert evaluate(reader, ids, limit=40) == evaluate(reader, ids, limit=99) == evaluate(reader, ids)


def test_signs_are_checked():
    reader = _reader("cram-demo", d_model=8, n_layers=1)
    with pytest.raises(InputError, match="limit: -3; use a positive number"):
        evaluate(reader, np.arange(9), limit=-3)
    with pytest.raises(InputError, match="window: -1; use a positive number"):
        evaluate(reader, np.arange(9), window=-1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_an_error(value):
    reader = _reader("cram-demo", d_model=8, n_layers=1)
    reader.model.params["head.weight"][3] = value
    with np.errstate(all="ignore"), pytest.raises(InputError, match=r"the loss is (nan|inf) within the first 8 tokens"):
        evaluate(reader, np.arange(9))


def test_softmax_attention_is_read_in_windows_by_default():
    assert default_window(preset("transformer-1m"), 512) == 512
    assert default_window(preset("based-1m"), 512) == 0
    assert default_window(preset("cram-1m"), 512) == 0
    assert Score(1e6, 10).perplexity == math.inf


def test_bernoulli_and_gaussian_frames():
    random = np.random.default_rng(0)
    frames = random.integers(0, 2, (9, 4)).astype(np.float32)
    for kind, width in (("bernoulli", 4), ("gaussian", 8)):
        config = preset("cram-video", d_model=8, n_layers=1, frame_size=4, frame_head=kind)
        z = random.normal(size=(9, width))
        if kind == "bernoulli":
            p = 1 / (1 + np.exp(-z))
            density = np.where(frames == 1, p, 1 - p)
        else:
            mean, variance = z[:, :4], np.exp(z[:, 4:])
            density = np.exp(-((frames - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        judge.same(nll(config, z, frames), -np.log(density), SUMS)
        score = evaluate(Reader(config, init_params(config), "float64"), frames)
        assert score.targets == 8 * 4


def test_nothing_to_predict():
    with pytest.raises(InputError, match="at least 2"):
        evaluate(_reader("cram-demo", d_model=8, n_layers=1), np.zeros(1, np.int64))


def test_ids_outside_the_vocabulary():
    with pytest.raises(InputError, match="outside the vocabulary"):
        evaluate(_reader("cram-demo", d_model=8, n_layers=1, vocab_size=100), np.array([1, 2, 100]))
