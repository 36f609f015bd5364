"""A graph whose weights pass 2 GB: python -m nox -s large (it takes 12 GB of memory, and 5 GB of disk)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from unisono_onnx import export
from unisono_spec.contract import InputError, count_params, preset
from unisono_spec.models import create
from unisono_tools.backends.onnx import Reader

CONFIG = preset("cram-fixed-gpt2", d_model=2560, n_layers=8, head_bias=True)


def test_weights_beyond_two_gigabytes(tmp_path: Path) -> None:
    assert 4 * count_params(CONFIG) > 2**31
    # a short run of numbers over and over: to draw them all would take minutes
    drawn = np.random.default_rng(0).standard_normal(10_007).astype(np.float32)
    params = {name: np.resize(drawn, p.shape) * np.float32(p.shape[-1] ** -0.5) for name, p in CONFIG.params().items()}
    path = tmp_path / "model.onnx"
    export(CONFIG, params, path)
    weights = tmp_path / "model.onnx.data"
    assert weights.stat().st_size > 2**31
    assert path.stat().st_size < 2**20

    reader, tokens = Reader(path), np.arange(20)[None]
    found, after = reader.forward(tokens, reader.init_state(1))
    del reader
    true, state = create(CONFIG, params, dtype="float32").forward(tokens)
    assert (found.argmax(-1) == true.argmax(-1)).all()
    assert set(after) == set(state)

    elsewhere = tmp_path / "elsewhere.onnx"
    path.rename(elsewhere)
    path.write_bytes(elsewhere.read_bytes())
    moved = tmp_path / "moved.data"
    weights.rename(moved)
    with pytest.raises(InputError, match=r"in model\.onnx\.data; move both files"):
        Reader(path)
    moved.rename(weights)
    export(
        preset("cram-demo", n_layers=1), {n: np.resize(drawn, p.shape) for n, p in preset("cram-demo", n_layers=1).params().items()}, path
    )
    assert not weights.exists()
