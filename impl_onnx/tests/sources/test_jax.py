"""A model in JAX gives the same file as its parameters do, where PyTorch is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import unisono_jax
from unisono_jax.onnx import export as export_model
from unisono_onnx import export
from unisono_spec.contract import InputError, preset

SMALL = {"cram-1m": {"n_layers": 1, "d_model": 8}, "mamba-1m": {"n_layers": 1, "d_model": 8}, "maru-1m": {"n_layers": 1, "d_model": 8}}


@pytest.mark.parametrize("name", SMALL)
def test_the_same_file(name: str, tmp_path: Path) -> None:
    model = unisono_jax.create(preset(name, **SMALL[name]), seed=3)
    export_model(model, tmp_path / "model.onnx", {"note": "a"}, target="portable")
    export(model.config, unisono_jax.numpy_params(model), tmp_path / "params.onnx", {"note": "a"})
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "params.onnx").read_bytes()


def test_models_that_compute_in_another_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype='float32'"):
        export_model(unisono_jax.create(preset("cram-demo", n_layers=1), dtype="bfloat16"), tmp_path / "a.onnx")
    assert not any(tmp_path.iterdir())


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model: None has type NoneType; give a model"):
        export_model(None, tmp_path / "a.onnx")  # pyright: ignore[reportArgumentType]
