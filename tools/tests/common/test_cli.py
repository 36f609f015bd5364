"""The command's verbs that need no framework."""

from __future__ import annotations

import importlib.metadata

import pytest
from unisono_spec.contract import count_params, presets
from unisono_tools import cli
from unisono_tools.precompute import PrecomputedCorpus
from unisono_tools.train import checkpoint


def test_help_names_every_verb(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(verb in out for verb in cli.VERBS)
    assert command()[0] == 2
    assert command("--version")[1] == f"unisono {importlib.metadata.version('unisono')}\n"


@pytest.mark.parametrize("verb", ["eval", "generate", "precompute", "export", "list", "inspect", "train"])
def test_help_of_each_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: unisono {verb}" in capsys.readouterr().out


def test_list_counts_parameters(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command("list")
    assert code == 0
    for name, config in presets().items():
        assert any(name in line and f"{count_params(config):,}" in line for line in out.splitlines())
    assert "1,060,212" in out


@pytest.fixture
def model(tiny, made, tmp_path):
    return checkpoint.save(tmp_path / "run", made(tiny()))


def test_eval(command, model):
    code, out, _ = command("eval", model, "--backend", "numpy")
    assert code == 0
    lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines()[1:3])
    assert lines["bits per byte"] == lines["bits per token"]
    assert 5 < float(lines["bits per byte"]) < 12


def test_generation_is_a_function_of_the_seed(command, model):
    texts = [command("generate", model, "--backend", "numpy", "--max_new_tokens", 12, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("The ")


def test_arguments_from_yaml(command, model, tmp_path):
    path = tmp_path / "generate.yaml"
    path.write_text("prompt: 'Seven '\nmax_new_tokens: 5\nbackend: numpy\n")
    code, out, _ = command("generate", model, "--config", path)
    assert code == 0
    assert out.startswith("Seven ")
    assert command("generate", model, "--config", path, "--prompt", "Four ")[1].startswith("Four ")


def test_precompute(command, text, tmp_path):
    code, out, _ = command("precompute", tmp_path / "xi", "--corpus", text)
    assert code == 0
    assert str(tmp_path / "xi") in out
    assert PrecomputedCorpus.open(tmp_path / "xi").xi.shape[1] == 8


def test_inspect(command, model, tmp_path):
    code, out, _ = command("inspect", model, "--out", tmp_path / "figures", "--length", 6)
    assert code == 0
    assert len(list((tmp_path / "figures").glob("*.png"))) == len(out.splitlines())
