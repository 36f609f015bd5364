"""Arguments of the wrong kind, in PyTorch."""

from __future__ import annotations

import bad_arguments
import pytest
import torch
import unisono_torch

ROOM = bad_arguments.Room("torch", unisono_torch, torch.from_numpy)


@pytest.mark.parametrize("name", bad_arguments.MODELS)
def test_every_argument_of_every_verb(name):
    assert bad_arguments.check(ROOM, bad_arguments.MODELS[name]) > 1000


def test_load(tmp_path):
    bad_arguments.files(ROOM, tmp_path)
