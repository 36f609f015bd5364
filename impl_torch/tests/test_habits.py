"""What users of PyTorch try first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import unisono_torch as un
from unisono_spec.contract.files import save_params
from unisono_torch import InputError
from unisono_torch.nn import LinearAttention, MoMGRU

SMALL = un.preset("cram-1m", d_model=8, n_layers=1)


def test_a_preset_by_its_name_is_the_preset() -> None:
    named, made = un.create("cram-1m", seed=2), un.create(un.preset("cram-1m"), seed=2)
    assert all(torch.equal(p, q) for p, q in zip(named.parameters(), made.parameters(), strict=True))
    with pytest.raises(InputError, match="'cram1m' is unknown; did you mean 'cram-1m'"):
        un.create("cram1m")


def test_torch_s_own_dtypes() -> None:
    model = un.create("lat-1m", dtype=torch.bfloat16, param_dtype=torch.float16)
    assert model.dtype == "bfloat16"
    assert model.head.weight.dtype == torch.float16  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    with pytest.raises(InputError, match="dtype: 'int8'"):
        un.create("lat-1m", dtype=torch.int8)


def test_meta_tensors_have_the_shapes_and_take_weights() -> None:
    model, real = un.create("mamba-1m", device="meta", dtype="bfloat16"), un.create("mamba-1m")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in real.named_parameters()}
    model.load_state_dict(real.state_dict(), assign=True)
    logits, _ = model(torch.zeros(1, 2, dtype=torch.int64))
    assert logits.dtype == torch.bfloat16


def test_meta_tensors_have_no_numbers(tmp_path: Path) -> None:
    """Whatever needs them says so."""
    meta, model, tokens = un.create(SMALL, device="meta"), un.create(SMALL), torch.zeros(2, 3, dtype=torch.int64)
    for run in (
        lambda: meta.generate(tokens, 2),
        lambda: model.generate(tokens.to("meta"), 2),
        lambda: meta.save(tmp_path / "model.safetensors"),
        lambda: un.numpy_state(meta.init_state(2)),
    ):
        with pytest.raises(InputError, match="'meta'"):
            run()
    assert not list(tmp_path.iterdir())


def test_masked_arrays_are_refused() -> None:
    """Also where they become others, which have no mask."""
    model, prompt = un.create(SMALL), np.zeros((2, 3), np.int64)
    for run in (
        lambda: model.generate(np.ma.masked_array(prompt), 1),
        lambda: model.generate(prompt, 1, valid=np.ma.masked_array(prompt == 0)),
        lambda: un.state_from_numpy({"layers.0.xi": np.ma.masked_array(prompt)}),
    ):
        with pytest.raises(InputError, match="MaskedArray, which computes by rules of its own"):
            run()


def test_tensors_are_saved_as_arrays_are(tmp_path: Path) -> None:
    model = un.create(SMALL)
    save_params(tmp_path / "model.safetensors", SMALL, model.state_dict())  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), un.load(tmp_path / "model.safetensors").parameters(), strict=True))


def test_generating_under_transforms_is_refused() -> None:
    model = un.create(SMALL)
    with pytest.raises(InputError, match=r"outside of torch\.func"):
        torch.func.vmap(lambda row: torch.as_tensor(model.generate(row[None], 2).tokens))(torch.zeros(2, 3, dtype=torch.int64))


def test_a_layer_s_dtype_and_device_are_a_model_s() -> None:
    """By name too."""
    layer = un.nn.LinearAttention(8, 2, dtype="bfloat16", device="cpu")
    assert next(layer.parameters()).dtype == torch.bfloat16
    assert layer.init_state(1, dtype="float64")["S"].dtype == torch.float64
    for dtype in ("int8", torch.int8, torch.complex64):
        with pytest.raises(InputError, match=r"dtype: 'int8'|dtype: 'complex64'"):
            LinearAttention(8, 2, dtype=dtype)
    with pytest.raises(InputError, match="device: 'tpu'"):
        LinearAttention(8, 2, device="tpu")
    with pytest.raises(InputError, match="dtype: 'int8'"):
        layer.init_state(1, dtype=torch.int8)


def test_a_device_context_places_models_and_layers() -> None:
    with torch.device("meta"):
        made: list[torch.nn.Module] = [un.create("lat-1m"), LinearAttention(8, 2), MoMGRU(8)]
    assert all(p.is_meta for module in made for p in module.parameters())
    with torch.device("cpu"):
        assert un.create("lat-1m").device.type == "cpu"


def test_the_repr_says_sizes_count_and_config() -> None:
    shown = repr(un.create("maru-1m"))
    for part in ("1,", "parameters", "d_model=144", "Linear(144, 144, bias=True)", "RMSNorm(144", "Embedding(256, 144)", "width=4"):
        assert part in shown, part
