"""Losses that are computed where the logits are equal those of logits that come to NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import init_params, preset
from unisono_tools import evaluation
from unisono_tools.backends.torch.reader import Reader


@pytest.mark.parametrize("window", [0, 10])
@pytest.mark.parametrize("name", ["lat-1m", "transformer-1m"])
def test_judged_where_the_logits_are(name, window, monkeypatch):
    config = preset(name, d_model=8, n_layers=1, head_width=8)
    reader = Reader(config, init_params(config, 1), "float64", "cpu")
    ids = np.random.default_rng(0).integers(0, 256, 81)
    given = {"limit": 75, "window": window, "documents": np.array([0, 9, 17, 30])}
    assert not reader.far
    near = evaluation.evaluate(reader, ids, **given)
    monkeypatch.setattr(Reader, "far", True)
    monkeypatch.setattr(Reader, "forward", None)
    monkeypatch.setattr(evaluation, "LOGITS", config.vocab_size)
    asked, judge = [], reader.nats
    monkeypatch.setattr(reader, "nats", lambda *given: asked.append(given[0].shape[1]) or judge(*given), raising=False)
    far = evaluation.evaluate(reader, ids, **given)
    assert asked == [16, 16, 16, 16, 11]
    assert far.targets == near.targets == 75
    assert far.nats == pytest.approx(near.nats, rel=numerics.rounding("float64", 2**12))
