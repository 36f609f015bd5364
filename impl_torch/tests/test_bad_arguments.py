"""Arguments of the wrong kind, in PyTorch."""

from __future__ import annotations

import bad_arguments
import pytest
import torch
import unisono_torch
from unisono_spec.contract import InputError
from unisono_spec.contract.cram import CRAMConfig

ROOM = bad_arguments.Room("torch", unisono_torch, torch.from_numpy)


@pytest.mark.parametrize("name", bad_arguments.MODELS)
def test_every_argument_of_every_verb(name):
    assert bad_arguments.check(ROOM, bad_arguments.MODELS[name]) > 1000


@pytest.mark.parametrize("name", ["tokens", "reset", "valid", "xi"])
def test_what_lies_elsewhere(name):
    """Each array, and a state that was read from a file, on another device than the model."""
    model = unisono_torch.create(CRAMConfig(d_model=4, n_layers=1, vocab_size=30))
    given = {"tokens": torch.zeros(1, 3, dtype=torch.int64), **dict.fromkeys(("reset", "valid"), torch.zeros(1, 3, dtype=torch.bool))}
    state = model.init_state(1)
    moved = state if name in state else given
    moved[name] = moved[name].to("meta")
    with pytest.raises(InputError, match=rf"{name}: on meta, the model is on cpu; move it with .to\('cpu'\)"):
        model(given.pop("tokens"), state, **given)


def test_load(tmp_path):
    bad_arguments.files(ROOM, tmp_path)
