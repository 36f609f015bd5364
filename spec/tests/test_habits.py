"""The spec offers what the other rooms offer: calls, presets by name, frameworks' dtypes, files, states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import unisono_spec as un
from unisono_spec import InputError


def test_the_other_rooms_names(tmp_path: Path) -> None:
    model, tokens = un.create("lat-1m", dtype=np.float32), np.arange(8).reshape(2, 4)  # pyright: ignore[reportArgumentType]
    assert model.dtype == "float32"
    assert model.device == "cpu"
    assert "1,057,408 parameters, dtype='float32', LATConfig(d_model=128" in repr(model)
    logits, state = model(tokens)
    model.save(tmp_path / "m.safetensors")
    again, end = un.load(tmp_path / "m.safetensors", dtype="float32")(tokens)
    assert (again == logits).all()
    assert all((end[name] == a).all() for name, a in un.state_from_numpy(un.numpy_state(state)).items())
    copied = un.numpy_params(model)
    copied["head.bias"][:] = 7
    assert not model.params["head.bias"].any()


def test_names_that_are_no_presets() -> None:
    with pytest.raises(InputError, match="preset: 'lat-base1' is unknown; did you mean 'lat-base'"):
        un.create("lat-base1")
    with pytest.raises(InputError, match="dtype: 'bfloat16'"):
        un.create("lat-1m", dtype="bfloat16")
