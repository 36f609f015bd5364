"""Dependency matrices, reach and decoding, against what the mathematics says of them; and the figures they become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import unisono_spec
from unisono_spec.contract import InputError, preset
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.files import save_params
from unisono_tools.experiments import figures
from unisono_tools.experiments.inspect import decode, decoding_accuracy, dependency_matrix, effective_reach, inspect

PNG = b"\x89PNG\r\n\x1a\n"
FIXED = CRAMConfig(d_model=16, n_layers=1)
ADAPTIVE = preset("cram-1m", d_model=16, n_layers=2)


@pytest.mark.parametrize("config", [FIXED, ADAPTIVE, preset("cram-video", frame_size=6, d_model=16, n_layers=1)])
def test_dependencies_are_the_whole_lower_triangle(config):
    matrix = dependency_matrix(unisono_spec.create(config), 12)
    assert (matrix[np.triu_indices(12, 1)] == 0).all()
    assert (matrix[np.tril_indices(12)] > 0).all()


def test_an_exclusive_sum_sees_itself_through_the_residual_only():
    config = preset("cram-1m", d_model=16, n_layers=1, exclusive=True)
    matrix = dependency_matrix(unisono_spec.create(config), 6)
    assert (matrix[np.tril_indices(6)] > 0).all()
    without = preset("cram-1m", d_model=16, n_layers=1, exclusive=True, residual="after")
    assert (np.diag(dependency_matrix(unisono_spec.create(without), 6)) == 0).all()


def test_the_derivative_is_that_of_a_difference():
    model = unisono_spec.create(FIXED)
    matrix = dependency_matrix(model, 5)
    # far inputs fade by λ a token, here seen over two rows whose contexts differ little
    assert matrix[4, 0] < matrix[4, 4] / 4
    longer = dependency_matrix(model, 40)
    assert 0 < 2**30 * longer[39, 0] < longer[39, 39]


@pytest.mark.parametrize(("dtype", "digits"), [("float64", 53), ("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_the_reach_is_the_width_of_the_significand(dtype, digits):
    reach = effective_reach(FIXED, dtype)
    # a bit weighs ½·(σ(1) − σ(0)) ≈ 2^−3.1 and halves with each token; sums in [½, 1) have spacing 2^−digits
    assert abs(np.median(reach) - (digits - 3)) <= 2


def test_the_adaptive_sum_forgets_nothing():
    assert (effective_reach(ADAPTIVE, "float64", limit=300, trials=20) == 300).all()


def test_bits_come_back_from_xi():
    rng = np.random.default_rng(0)
    for decay, count in ((0.5, 40), (0.25, 20)):
        config = preset("cram-demo", decay=decay)
        tokens = rng.integers(0, 256, (1, 40))
        model = unisono_spec.create(config)
        _, state = model.forward(tokens)
        bits = decode(state["xi"], decay, count, length=40)  # [1, code, count]
        assert np.array_equal(bits[0].T @ (1 << np.arange(7, -1, -1)), tokens[0, ::-1][:count])
    with pytest.raises(InputError, match="overlap"):
        decode(np.zeros(8), 0.6, 3)


def test_narrower_numbers_hold_fewer_tokens():
    shares = decoding_accuracy(FIXED)
    held = [int((shares[name] > 0.75).sum()) for name in ("bfloat16", "float16", "float32", "float64")]
    assert held == sorted(held)
    assert held[2] == pytest.approx(21, abs=1)
    assert held[3] == pytest.approx(49, abs=1)


def test_everything_is_drawn(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_params(path, FIXED, unisono_spec.create(FIXED).params)
    drawn = inspect(path, tmp_path, length=8)
    assert set(drawn) == {"dependency", "reach", "decoding"}
    assert all(figure.read_bytes().startswith(PNG) for figure in drawn.values())
    with pytest.raises(InputError, match="length"):
        inspect(path, tmp_path, length=0)


def test_the_loss_curve_is_drawn(tmp_path: Path):
    steps = list(range(1, 300))
    losses = [8 / step**0.5 for step in steps]
    path = figures.loss_curve(tmp_path / "loss.png", steps, losses, [(100, 1.0), (299, 0.7)], {"order 3": 2.3, "order 4": 2.0})
    assert path.read_bytes().startswith(PNG)
    assert figures.loss_curve(tmp_path / "one.png", [1], [5.0]).read_bytes().startswith(PNG)


def test_a_mistyped_preset_is_told(refused):
    assert "model: 'cram-9m' is neither a preset nor a run's folder" in refused("inspect", "cram-9m")
