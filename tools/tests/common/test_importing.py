"""`unisono import`: what it writes is read by every verb; from a folder, and from the hub's cache with no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from unisono_spec import create, from_hf
from unisono_spec.contract import init_params
from unisono_spec.contract.files import load_params
from unisono_spec.contract.mamba import MambaConfig

CONFIG = MambaConfig(d_model=4, n_layers=1, vocab_size=260, norm_eps=1e-5)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 259}, "merges": [["a", "b"]]}}


@pytest.fixture
def published(publish: Callable[..., Path], tmp_path: Path) -> Path:
    """With a tokenizer of its own."""
    folder = publish(tmp_path / "published")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in the cache of the hub's client, as its snapshot of a commit that main stands at; there is no network."""
    repository = tmp_path / "hub/models--state-spaces--mamba-tiny"
    shutil.copytree(published, repository / "blobs")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_what_it_writes_is_read_by_every_verb(command, refused, published, tmp_path):
    code, out, err = command("import", published, "--out", tmp_path / "mine")
    assert (code, err) == (0, "")
    assert "mamba, 1," in out
    config, params = load_params(tmp_path / "mine/model.safetensors")
    assert config == CONFIG
    assert np.array_equal(params["embedding.weight"], init_params(CONFIG, seed=3)["embedding.weight"])
    code, out, _ = command("generate", tmp_path / "mine", "--prompt", "ab", "--max_new_tokens", 3, "--backend", "numpy", "--seed", 1)
    assert code == 0
    (tmp_path / "text.txt").write_text("abba" * 2000)
    assert command("eval", tmp_path / "mine", "--corpus", tmp_path / "text.txt", "--limit", 9, "--backend", "numpy")[0] == 0
    assert "holds a model already" in refused("import", published, "--out", tmp_path / "mine")


def test_without_a_tokenizer(command, published, tmp_path):
    (published / "tokenizer.json").unlink()
    code, _, err = command("import", published, "--out", tmp_path / "mine")
    assert code == 0
    assert "--tokenizer" in err
    assert not (tmp_path / "mine/tokenizer.json").exists()


def test_a_tokenizer_of_another_model(refused, published, tmp_path):
    (published / "tokenizer.json").write_text(json.dumps(TOKENIZER).replace("259", "260"))
    assert "261 ids, the model 260" in refused("import", published, "--out", tmp_path / "mine")
    (published / "tokenizer.json").write_text("[")
    assert "tokenizer.json" in refused("import", published, "--out", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("source", ["state-spaces/mamba-tiny", "hf:state-spaces/mamba-tiny"])
def test_from_the_hub(command, hub, source):
    code, out, err = command("import", source, "--out", "mine")
    assert (code, err) == (0, "")
    assert "from hf:state-spaces/mamba-tiny" in out
    tokens = np.arange(9)[None]
    ours = create(CONFIG, init_params(CONFIG, seed=3)).forward(tokens)[0]
    assert np.array_equal(from_hf(source).forward(tokens)[0], ours)
    assert np.array_equal(from_hf(source, revision=COMMIT).forward(tokens)[0], ours)


def test_a_folder_goes_before_a_repository(hub, tmp_path):
    shutil.copytree(hub, tmp_path / "state-spaces/mamba-tiny")
    file = tmp_path / "state-spaces/mamba-tiny/model.safetensors"
    tensors = load_file(file)
    save_file({name: 2 * a for name, a in tensors.items()}, file, {"format": "pt"})
    tokens = np.arange(9)[None]
    assert not np.array_equal(
        from_hf("state-spaces/mamba-tiny").forward(tokens)[0], from_hf("hf:state-spaces/mamba-tiny").forward(tokens)[0]
    )


def test_what_the_hub_has_not(refused, hub, tmp_path):
    assert "could not be read from the hub" in refused("import", "state-spaces/other", "--out", "mine")
    assert "could not be read from the hub" in refused("import", "state-spaces/mamba-tiny", "--revision", "v2", "--out", "mine")
    (hub / "model.safetensors").unlink()
    assert "pickles" in refused("import", "state-spaces/mamba-tiny", "--out", "mine")
    assert "revision" in refused("import", tmp_path / "published", "--revision", "main", "--out", "mine")
