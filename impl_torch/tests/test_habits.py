"""What users of PyTorch try first."""

from __future__ import annotations

import pytest
import torch
import unisono_torch as un
from unisono_torch import InputError
from unisono_torch.nn import LinearAttention, MoMGRU


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
