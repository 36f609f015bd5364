"""What holds for all architectures at once: names, files, and counts that let them be compared."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import checking
import numpy as np
import pytest
from unisono_spec.contract import ARCHITECTURES, config_from_dict, config_to_dict, count_params, init_params, preset, presets
from unisono_spec.contract.files import load_state, save_params, save_state
from unisono_spec.models import create, load

SMALL = [name for name in presets() if name.endswith("-1m")]


def test_presets() -> None:
    """No two architectures share a preset's name, and each preset survives JSON."""
    modules = [importlib.import_module(f"unisono_spec.contract.{arch}") for arch in ARCHITECTURES]
    assert len(presets()) == sum(len(module.PRESETS) for module in modules)
    for name, config in presets().items():
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config, name
        assert hash(config) == hash(config.replace())


def test_fair_comparison() -> None:
    """Everything called 1m has the same number of parameters up to 1 %."""
    counts = {name: count_params(config) for name, config in presets().items() if name.endswith("-1m")}
    assert {preset(name).arch for name in counts} == set(ARCHITECTURES)
    assert max(counts.values()) <= 1.01 * min(counts.values()), counts


@pytest.mark.parametrize("name", SMALL)
def test_files_and_generation(name: str, tmp_path: Path) -> None:
    """A saved model and a saved state continue where they stopped."""
    config = preset(name)
    save_params(tmp_path / "model.safetensors", config, init_params(config, 3))
    model = load(tmp_path / "model.safetensors", dtype="float32")
    tokens = np.arange(4)[None]
    _, state = model.forward(tokens[:, :3], model.init_state(1, 6))
    save_state(tmp_path / "state.safetensors", config, state)
    found, again = load_state(tmp_path / "state.safetensors")
    assert found == config
    checking.same(model.step(tokens[:, 3], again), model.step(tokens[:, 3], state), 0)
    text = create(config, model.params).generate(tokens, 2).tokens
    assert text[0, 0] == create(config, model.params).forward(tokens)[0][0, -1].argmax()


@pytest.mark.parametrize("name", SMALL)
def test_nothing_to_read(name: str) -> None:
    """A batch of no sequences, and sequences in which nothing is valid."""
    model = create(preset(name), dtype="float32")
    for form in ("recurrent", "parallel"):
        logits, state = model.forward(np.zeros((0, 2), int), form=form)
        assert logits.shape == (0, 2, 256)
        assert {len(a) for a in state.values()} == {0}
        _, start = model.forward(np.array([[5, 6]]), model.init_state(1, 3))
        _, state = model.forward(np.array([[1, 2]]), start, None, np.zeros((1, 2), bool), form=form)
        checking.same(state, start, 0)
