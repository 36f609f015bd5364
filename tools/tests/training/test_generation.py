"""Both backends continue ragged prompts under a repetition penalty as NumPy does."""

from __future__ import annotations

import numpy as np
from unisono_spec.contract.sampling import Sampling
from unisono_tools.backends import open_reader
from unisono_tools.train import checkpoint


def test_a_repetition_penalty_in_every_room(backend, tiny, made, tmp_path):
    path = checkpoint.save(tmp_path, made(tiny(), seed=1)) / "model.safetensors"
    prompt = np.random.default_rng(0).integers(0, 256, (2, 8))
    valid = np.arange(8) < np.array([[5], [8]])
    for sampling in (Sampling(repetition_penalty=1.6), Sampling(1.2, 40, 0.95, 3, 1.6)):
        truth, found = (open_reader(path, name, "float64").generate(prompt, 6, sampling, valid=valid) for name in ("numpy", backend))
        assert np.array_equal(found.tokens, truth.tokens)
        assert found.seen is not None
        assert truth.seen is not None
        assert np.array_equal(found.seen, truth.seen)
