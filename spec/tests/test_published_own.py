"""What unisono_torch.hf saves, read without transformers: the contract's fields and names, in several files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from unisono_spec.contract import InputError, init_params, preset
from unisono_spec.contract.published import plan_of, read


@pytest.mark.parametrize(("kind", "name"), [("unisono_maru", "maru-1m"), ("unisono_selective_ssm", "mamba-1m"), ("unisono_lat", "lat-1m")])
def test_several_files(kind: str, name: str, tmp_path: Path) -> None:
    config = preset(name, d_model=32, n_layers=1)
    params, files = init_params(config), {}
    for number, part in enumerate((list(params)[:5], list(params)[5:])):
        save_file({key: params[key] for key in part}, tmp_path / f"{number}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(part, f"{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    fields = {"router_temperature" if key == "temperature" else key: value for key, value in config.to_dict().items()}
    given = {**fields, "model_type": kind, "tie_word_embeddings": False, "transformers_version": "5.23.0"}
    place = tmp_path / "config.json"
    place.write_text(json.dumps(given))
    found = read(tmp_path)
    assert found.config == config
    assert all(np.array_equal(found.params[key], params[key]) for key in params)
    place.write_text(json.dumps({**given, "n_layers": -1}))
    with pytest.raises(InputError, match=r"config\.json: \w+\.n_layers: -1"):
        plan_of(place)
