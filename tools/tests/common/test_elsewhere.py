"""Options of other trainers: each is answered by what it is called here, which exists; the page lists the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from unisono_spec.contract import preset, presets
from unisono_tools.commands import generate
from unisono_tools.commands.arguments import of_class, of_function
from unisono_tools.commands.elsewhere import TABLES
from unisono_tools.config import TrainConfig
from unisono_tools.train import checkpoint

PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
OURS = {"train": {a.name for a in of_class(TrainConfig)} | {"resume", "dry_run"}, "generate": {a.name for a in of_function(generate.run)}}


@pytest.mark.parametrize("verb", TABLES)
def test_what_is_named_exists(verb):
    fields = {name for model in presets() for name in preset(model).to_dict()}
    for theirs, here in TABLES[verb].items():
        assert theirs not in OURS[verb]
        for option in re.findall(r"--([a-z0-9_.]+)", here):
            name = option.rstrip(".")
            if name.startswith("model.overrides."):
                assert name.removeprefix("model.overrides.") in fields, theirs
            elif "unisono eval" not in here:
                assert name in OURS[verb] or any(other.startswith(f"{name}.") for other in OURS[verb]), (theirs, name)


@pytest.mark.parametrize("verb", TABLES)
def test_the_page_lists_them(verb):
    rows = dict(
        re.findall(r"^\| `([a-z_0-9]+)` \| (.*) \|$", PAGE.split(f"<!-- {verb}: begin -->")[1].split("<!-- end -->")[0], re.MULTILINE)
    )
    assert {name: said.replace("`", "") for name, said in rows.items()} == {k: v.replace("`", "") for k, v in TABLES[verb].items()}


def test_the_command_says_so(refused, text, tiny, made, tmp_path):
    assert "--max_iters: no such argument; here it is --steps" in refused("train", "--max_iters", 5)
    assert "--gradient-accumulation-steps" not in refused("train", "--gradient-accumulation-steps=4")
    assert "here it is --accumulation" in refused("train", "--gradient-accumulation-steps=4")
    assert "here it is --optimizer.lr" in refused("train", "--training.learning_rate", 1e-3)
    assert "here it is --prompt" in refused("generate", tmp_path, "--start", "x")
    config = tmp_path / "c.yaml"
    config.write_text("num_train_epochs: 3\n")
    assert "num_train_epochs: no such argument; here it is --epochs" in refused("train", "--config", config)
    assert "did you mean" in refused("train", "--stepps", 3)
    assert "did you mean '--model.preset'" in refused("train", "--preset", "lat-1m")
    assert "did you mean '--data.order'" in refused("train", "--order=streamed")
    config.write_text("preset: lat-1m\n")
    assert "did you mean 'model.preset'" in refused("train", "--config", config)
    assert "here it is --optimizer.lr (if learning_rate is meant)" in refused("train", "--lerning_rate", 3)
    assert "did you mean '--data.eval_tokens'" in refused("train", "--data.eval_tokenz", 3)
    few = ("--data.corpus", text, "--data.eval_tokens", 64, "--seq_len", 16, "--out", tmp_path / "run", "--dry_run")
    assert "init_from: resume; use --resume RUN" in refused("train", *few, "--init_from=resume")
    assert "init_from: gpt2; no preset is that model" in refused("train", *few, "--init_from=gpt2")
    assert "no such file or folder" in refused("train", *few, "--init_from", tmp_path / "nowhere")
    checkpoint.save(tmp_path / "run", made(tiny()))
    assert "seed is 0 there and 3 here" in refused("train", *few, "--seed", 3)
