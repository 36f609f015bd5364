"""The committed reference vectors are what the manifest and the spec say, and a damaged one is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from unisono_conformance.vectors import FOLDER, MANIFEST, check
from unisono_conformance.vectors.sampling import NAME, check_sampling
from unisono_spec.contract.errors import InputError

CRAM_BYTES, BYTES = 400_000, 1_000_000


def test_vectors() -> None:
    assert check() > 0
    assert sum(path.stat().st_size for path in FOLDER.glob("cram*.safetensors")) < CRAM_BYTES
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < BYTES


def test_damage_is_noticed(tmp_path: Path) -> None:
    for path in (*FOLDER.glob("*.safetensors"), FOLDER / MANIFEST):
        shutil.copy(path, tmp_path)
    victim = min(tmp_path.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(InputError, match="hash"):
        check(tmp_path)
    victim.unlink()
    with pytest.raises(InputError, match=victim.name):
        check(tmp_path)


def test_choices_of_tokens(tmp_path: Path) -> None:
    assert check_sampling(FOLDER) > 100
    text = (FOLDER / NAME).read_text()
    for old, new in (('"near_tie": true', '"near_tie": false'), ('"id": 1,', '"id": 0,'), ('"u": 0.', '"u": 0.0')):
        assert old in text
        (tmp_path / NAME).write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=NAME):
            check_sampling(tmp_path)
