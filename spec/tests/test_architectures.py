"""What holds for all architectures at once: names, files, and counts that let them be compared."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path

import checking
import numpy as np
import pytest
from unisono_spec.contract import ARCHITECTURES, config_class, config_from_dict, config_to_dict, count_params, init_params, preset, presets
from unisono_spec.contract.errors import InputError
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


# The sources' values, and where this project departs from them its choice: written out, since each room reads them from the contract.
DEFAULTS = {
    "cram": {
        "scheme": "fixed", "d_model": 96, "n_layers": 12, "ffn_mult": 4, "vocab_size": 256, "tie_head": False, "head_bias": False,
        "dropout": 0.0, "codes": "binary", "code_bits": 8, "frame_size": 0, "frame_head": "bernoulli", "decay": 0.5, "position_bits": 20,
        "position_offset": "zero", "k_scale": 0.0, "input_norm": False, "exclusive": False, "residual": "before",
        "channel_weights": False, "learned_decay": False, "normalised": False, "skip": False,
    },
    "lat": {
        "d_model": 512, "n_layers": 6, "vocab_size": 50257, "head_width": 64, "attention": "linear", "feature_map": "elu1",
        "qk_width": 64, "head_norm": False, "window": 64, "conv_width": 3, "conv_mult": 4, "positions": "none", "max_positions": 2048,
        "rope_base": 10000.0, "norm": "layer", "ffn": "gelu", "ffn_mult": 4, "bias": True, "tie_head": False, "head_bias": True,
        "dropout": 0.0,
    },
    "infinityformer": {
        "d_model": 768, "n_layers": 12, "n_heads": 12, "d_ffn": 3072, "vocab_size": 50257, "n_scales": 3, "feature_map": "elu1",
        "decay": "learned", "gate": "scalar", "rope": "before", "rope_base": 10000.0, "compress_every": 0, "compress_rank": 0,
        "tie_head": True, "head_bias": False, "dropout": 0.1,
    },
    "maru": {
        "d_model": 640, "n_layers": 1, "prenorm": False, "vocab_size": 256, "head_hidden": 320, "expand": 2, "d_state": 16,
        "conv_width": 4, "dt_rank": 0, "n_banks": 4, "n_slots": 128, "d_memory": 64, "router_hidden": 32, "erase": "coupled",
        "router": "dense", "temperature": 1.0, "balance_rate": 0.01, "dropout": 0.0,
    },
    "transformer": {
        "d_model": 512, "n_layers": 6, "vocab_size": 50257, "head_width": 64, "ffn_mult": 4, "rope_base": 10000.0, "tie_head": False,
        "head_bias": True, "dropout": 0.0,
    },
    "mamba": {
        "d_model": 768, "n_layers": 24, "vocab_size": 50280, "expand": 2, "d_state": 16, "conv_width": 4, "dt_rank": 0, "bias": False,
        "conv_bias": True, "tie_head": True, "head_bias": False, "norm_eps": 1e-6, "dropout": 0.0,
    },
    "s4d": {
        "d_model": 512, "n_layers": 6, "vocab_size": 50257, "d_state": 64, "ffn_mult": 4, "tie_head": False, "head_bias": True,
        "dropout": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_defaults(arch: str) -> None:
    assert config_class(arch)().to_dict() == DEFAULTS[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("value", [1e-320, -1e-320, 1e300, math.nan, -math.inf])
def test_numbers_that_float32_does_not_hold(arch: str, value: float) -> None:
    """They would be 0 or infinite in every room but the spec."""
    for field in dataclasses.fields(config_class(arch)):
        with pytest.raises(InputError, match=rf"{arch}\.{field.name}: "):
            config_class(arch)().replace(**{field.name: value})
