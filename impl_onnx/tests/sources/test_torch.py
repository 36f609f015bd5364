"""A model in PyTorch gives the same file as its parameters do."""

from __future__ import annotations

from pathlib import Path

import pytest
import unisono_torch
from unisono_onnx import export
from unisono_spec.contract import InputError, preset
from unisono_torch.onnx import export as export_model

SMALL = {"cram-1m": {"n_layers": 1, "d_model": 8}, "mamba-1m": {"n_layers": 1, "d_model": 8}, "maru-1m": {"n_layers": 1, "d_model": 8}}


@pytest.mark.parametrize("name", SMALL)
def test_the_same_file(name: str, tmp_path: Path) -> None:
    model = unisono_torch.create(preset(name, **SMALL[name]), seed=3).train()
    export_model(model, tmp_path / "model.onnx", {"note": "a"}, target="portable")
    export(model.config, unisono_torch.numpy_params(model), tmp_path / "params.onnx", {"note": "a"})
    assert model.training, "export changed the model's mode"
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "params.onnx").read_bytes()


def test_parameters_in_bfloat16_are_computed_with_in_float32(tmp_path: Path) -> None:
    export_model(unisono_torch.create(preset("cram-demo", n_layers=1), param_dtype="bfloat16"), tmp_path / "a.onnx")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_models_that_compute_in_another_dtype_are_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype='float32'"):
        export_model(unisono_torch.create(preset("cram-demo", n_layers=1), dtype=dtype), tmp_path / "a.onnx")
    assert not any(tmp_path.iterdir())


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model: None has type NoneType; give a model"):
        export_model(None, tmp_path / "a.onnx")  # pyright: ignore[reportArgumentType]
