"""Both backends continue ragged prompts under a repetition penalty as NumPy does."""

from __future__ import annotations

import importlib

import numpy as np
from unisono_spec import from_hf, numpy_state
from unisono_spec.contract.sampling import NEAR_TIE, Sampling
from unisono_tools.backends import open_reader
from unisono_tools.train import checkpoint
from unisono_tools.verify import verify


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


def test_rounding_is_told_beside_the_margin(backend, tiny, made, tmp_path):
    """What bfloat16 turns is found, and float64 turns nothing of its own."""
    path = checkpoint.save(tmp_path, made(tiny(overrides={"d_model": 16}), seed=1)) / "model.safetensors"
    wide, prompt = open_reader(path, backend, "float64"), np.arange(5)
    exact = verify(wide, wide, prompt, 12, Sampling(1.5, seed=1))
    assert (exact.off, exact.other, exact.unreported, exact.count) == (0.0, 0, 0, 12)
    coarse = verify(open_reader(path, backend, "bfloat16"), wide, prompt, 60, Sampling(1.5, seed=1, repetition_penalty=1.1))
    assert NEAR_TIE < coarse.off < 1
    assert 0 < coarse.unreported <= coarse.other < 60
    assert "more than the margin of near-ties, 5e-05" in str(coarse)


def test_a_prompt_from_a_file(backend, tiny, made, command, tmp_path):
    """Read in pieces, it is what the same words are."""
    checkpoint.save(tmp_path / "run", made(tiny()))
    prompt = "ბიბლიოთეკა "
    (tmp_path / "prompt.txt").write_text(prompt)
    shown = []
    for words in (("--prompt", prompt), ("--prompt_file", tmp_path / "prompt.txt")):
        code, out, _ = command("generate", tmp_path / "run", "--backend", backend, "--max_new_tokens", 4, *words)
        assert code == 0
        shown.append(out.removeprefix(prompt))
    assert shown[0] == shown[1]


def test_published_weights_in_every_room(backend, publish, tmp_path):
    """NumPy writes half of a text, the backend goes on from its state: what NumPy writes alone."""
    folder, prompt = publish(tmp_path / "published", d_model=8, n_layers=2), np.arange(10).reshape(2, 5)
    ours, room = from_hf(folder), importlib.import_module(f"unisono_{backend}")
    whole, half = ours.generate(prompt, 64), ours.generate(prompt, 32)
    assert not whole.near_ties.any()
    state = room.state_from_numpy(numpy_state(half.state))
    rest = room.from_hf(folder).generate(half.tokens[:, -1:], 32, state=state, n_generated=32)
    assert np.array_equal(rest.tokens, whole.tokens[:, 32:])
