"""docs/from-the-papers.md: every command in it runs, with the libraries that it names, on local data of the hub's layout."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from unisono_tools import cli
from unisono_tools.data import hub, load_corpus
from unisono_tools.train import checkpoint
from unisono_tools.train.logs import read

PAGE = (Path(__file__).parents[3] / "docs" / "from-the-papers.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
SMALL = {
    "cram-paper": "--model.overrides.d_model 8 --model.overrides.n_layers 1",
    "infinityformer-1m": "--model.overrides.d_model 8 --model.overrides.n_layers 1 --model.overrides.n_heads 2 --model.overrides.d_ffn 8",
    "base.yaml": "--model.overrides.d_model 8 --model.overrides.n_layers 1 --model.overrides.head_width 4 --model.overrides.qk_width 4",
    "maru": "--model.overrides.d_model 8 --model.overrides.n_banks 2 --model.overrides.n_slots 4 --model.overrides.d_memory 4",
    "cram-1m": "--model.overrides.d_model 8 --model.overrides.n_layers 1 --data.corpus train.txt",
}
ALL = "--batch_size 8 --seq_len 16 --schedule.warmup_steps 1 --data.eval_tokens 64 --threads 1 --eval_every 2 --log_every 1"


def _write(folder: Path, front: str, files: dict[str, list[dict]]) -> str:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
    for name, rows in files.items():
        data = "\n".join(map(json.dumps, rows)).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return str(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Local folders laid out as the hub's repositories."""
    root = tmp_path_factory.mktemp("hub")
    lines = [{"text": f"Line {i} of a text that is read here, one of several."} for i in range(200)]
    three = "".join(f"  - split: {s}\n    path: {s}.jsonl\n" for s in ("train", "validation", "test"))
    wiki = _write(
        root / "wikitext", f"- config_name: wikitext-103-raw-v1\n  data_files:\n{three}",
        {"train.jsonl": lines, "validation.jsonl": lines[:40], "test.jsonl": lines[40:80]},
    )  # fmt: skip
    two = "".join(f"  - split: {s}\n    path: {s}.json.gz\n" for s in ("train", "validation"))
    c4 = _write(root / "c4", f"- config_name: en\n  data_files:\n{two}", {"train.json.gz": lines, "validation.json.gz": lines[:40]})
    stories = [{"document": {"text": row["text"]}, "question": "?"} for row in lines]
    qa = _write(root / "narrativeqa", f"- config_name: default\n  data_files:\n{three}", {f"{s}.jsonl": stories for s in hub.SPLITS})
    return {"wikitext-103-raw-v1": wiki, "c4": c4, "narrativeqa": qa}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name in ("train.txt", "validation.txt", "my-texts"):
        (folder / name).write_text(f"Some text for {name}, which is short. " * 60)
    (folder / "base.yaml").write_text(next(block for kind, block in BLOCKS if kind == "yaml"))
    return folder


def test_the_page_shows_what_the_readmes_show():
    assert len(COMMANDS) == 10
    for word in (
        "wikitext-103-raw-v1",
        "--split test",
        "n_scales 3",
        "feature_map elu1",
        "--epochs 3",
        "--wandb_project lalm",
        "narrativeqa",
    ):
        assert word in PAGE


@pytest.mark.parametrize("line", COMMANDS)
def test_it_runs(line, sets, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, folder in sets.items():
        monkeypatch.setitem(hub.SETS, name, dataclasses.replace(hub.SETS[name], repository=folder))
    words = shlex.split(line)
    if "train" in words:
        config = words[words.index("--config") + 1]
        words += shlex.split(f"{SMALL[config]} {ALL}")
        words += ["--epochs", "0.1"] if "--epochs" in words else ["--steps", "2"]
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
    if "train" in words:
        run = Path(words[words.index("--out") + 1]) if "--out" in words else Path("runs/lat")
        rows = read(run / "log.jsonl")
        assert np.isfinite([row["loss"] for row in rows if "loss" in row]).all()
        assert checkpoint.latest(run) is not None
        if "--wandb_project" in words:
            assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_own_splits_of_a_hub_set(sets):
    text = load_corpus(f"hf:{sets['wikitext-103-raw-v1']}:wikitext-103-raw-v1")
    assert bytes(text.validation[:9]) == b"Line 0 of"
    assert bytes(text.test[:10]) == b"Line 40 of"
    assert len(text.documents["train"]) == 200
