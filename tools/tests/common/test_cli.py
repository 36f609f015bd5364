"""The command's verbs that need no framework."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unisono_spec.contract import InputError, count_params, presets
from unisono_spec.contract.generation import Generated
from unisono_tools import cli, config, streaming
from unisono_tools.commands.arguments import of_class, of_function, parse
from unisono_tools.config import DataChoice, TrainConfig
from unisono_tools.data import load_corpus, load_tokenizer
from unisono_tools.precompute import PrecomputedCorpus
from unisono_tools.train import checkpoint
from unisono_tools.train.loader import loader


def test_help_names_every_verb(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(verb in out for verb in cli.VERBS)
    assert command()[0] == 2
    assert command("--version")[1] == f"unisono {importlib.metadata.version('unisono')}\n"


@pytest.mark.parametrize("verb", ["eval", "generate", "run", "precompute", "export", "list", "inspect", "train"])
def test_help_of_each_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: unisono {verb}" in capsys.readouterr().out


def test_help_of_each_argument_is_whole():
    """Also where its text goes on in another line."""
    for verb in ("evaluate", "experiment", "export", "generate", "importing", "inspect", "match", "precompute", "run", "task"):
        command = importlib.import_module(f"unisono_tools.commands.{verb}").run
        said = " ".join((command.__doc__ or "").split())
        texts = {argument.name: argument.help for argument in of_function(command)}
        assert all(f"{name}: {text}" in said and text for name, text in texts.items()), texts
        assert sum(len(f" {name}: {text}") for name, text in texts.items()) == len(said.partition("Args:")[2])


@pytest.mark.parametrize(
    ("package", "extra"),
    [("rich", "tools"), ("yaml", "tools"), ("matplotlib.figure", "tools"), ("pytest", "conformance"), ("optax", "jax")],
)
def test_a_missing_package_is_named_with_its_extra(package, extra, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("importlib.import_module", missing)
    assert cli.main(["train"]) == 2
    short = package.partition(".")[0]
    assert f"unisono train: error: the package {short} is not installed here; pip install 'unisono[{extra}]'" in capsys.readouterr().err


def test_a_missing_module_of_ours_is_a_fault(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "list", ("nowhere", ""))
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        cli.main(["list"])


def test_list_counts_parameters(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command("list")
    assert code == 0
    for name, made in presets().items():
        assert any(name in line and f"{count_params(made):,}" in line for line in out.splitlines())
    assert "1,060,212" in out
    assert len(out.splitlines()) == len(presets())
    assert "attention=17×conv+5×linear+5×window " in out
    # on a terminal a preset has one line of it
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    lines = command("list")[1].splitlines()
    assert len(lines) == len(presets())
    assert max(map(len, lines)) == 60


@pytest.fixture
def model(tiny, made, tmp_path):
    return checkpoint.save(tmp_path / "run", made(tiny()))


def test_eval(command, model):
    code, out, _ = command("eval", model, "--backend", "numpy")
    assert code == 0
    lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines()[1:3])
    assert lines["bits per byte"] == lines["bits per token"]
    assert 5 < float(lines["bits per byte"]) < 12


def test_eval_divides_by_the_bytes_that_it_predicted(command, tiny, made, tmp_path):
    # in the test split, a pair of letters is one token at first, each letter one later
    (tmp_path / "text.txt").write_text("ab" * 3900 + "c" * 200)
    model = '"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": [["a", "b"]]}'
    (tmp_path / "pairs.json").write_text(f'{{"version": "1.0", {model}, "decoder": {{"type": "Fuse"}}}}')
    data = DataChoice(corpus=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "pairs.json"))
    saved = dataclasses.replace(made(tiny(data=data)), tokenizer=load_tokenizer(data.tokenizer))
    checkpoint.save(tmp_path / "run", saved)
    (tmp_path / "pairs.json").unlink()  # the checkpoint holds its tokenizer
    for limit, number, size in ((5, 5, 10), (0, 299, 398), (149, 149, 248)):
        code, out, err = command("eval", tmp_path / "run", "--backend", "numpy", "--limit", limit, "--split", "test")
        assert code == 0, err
        lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines()[1:3])
        assert f"test: {number} tokens" in out
        # half a unit of the last printed digit, either way
        difference = Fraction(lines["bits per byte"]) * size - Fraction(lines["bits per token"]) * number
        assert abs(difference) <= Fraction(size + number, 2 * 10**6)


def test_hyphens_are_underscores(command, model):
    code, out, _ = command("generate", model, "--backend", "numpy", "--max-new-tokens", 3, "--temperature", 0)
    assert code == 0
    assert out == command("generate", model, "--backend", "numpy", "--max_new_tokens", 3, "--temperature", 0)[1]


def _chosen(token: int) -> Generated:
    return Generated(np.array([[token]]), np.zeros((1, 1), bool))


def test_generation_streams_whole_characters(command, model, monkeypatch):
    ids = b"caf\xe9\xf0\x9f\x98\x80! \xef\xbf\xbd\xe2"
    monkeypatch.setattr(streaming, "stream", lambda *_: map(_chosen, ids))
    assert command("generate", model, "--prompt", "a ", "--backend", "numpy")[1] == "a " + ids.decode(errors="replace") + "\n"


def test_the_default_backend_is_what_is_installed(monkeypatch):
    found = {"torch", "jax"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in found else None)
    for expected in ("torch", "jax", "numpy"):
        assert config.default_backend() == expected
        found.discard(expected)
    with pytest.raises(InputError, match="neither torch nor jax"):
        config.default_backend(training=True)


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
    for words in (("--config", path, "--prompt", "Four "), ("--prompt", "Four ", "--config", path)):
        assert command("generate", model, *words)[1].startswith("Four ")


def test_words_stand_above_files(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 3\nmodel: {overrides: {d_model: 8, n_layers: 1}}\n")
    (tmp_path / "b.yaml").write_text("steps: 4\nseed: 5\n")
    words = [
        "--model.overrides.d_model",
        "16",
        "--data.corpus",
        "here",
        "--config",
        str(tmp_path / "a.yaml"),
        "--config",
        str(tmp_path / "b.yaml"),
    ]
    values = parse("train", "", of_class(TrainConfig), words)
    assert (values["steps"], values["seed"], values["data"]["corpus"]) == (4, 5, "here")
    assert values["model"]["overrides"] == {"d_model": 16, "n_layers": 1}


def test_precompute(command, text, tmp_path):
    code, out, _ = command("precompute", tmp_path / "xi", "--corpus", text)
    assert code == 0
    assert str(tmp_path / "xi") in out
    assert PrecomputedCorpus.open(tmp_path / "xi").xi.shape[1] == 8


def test_what_is_written_into_a_home(command, model, text, tiny, tmp_path, monkeypatch):
    """And read from there; a shell leaves the ~ of --save_state=~/state as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert command("generate", model, "--backend", "numpy", "--max_new_tokens", 1, "--save_state=~/state")[0] == 0
    assert command("inspect", model, "--out", "~/figures", "--length", 2)[0] == 0
    assert command("precompute", "~/xi", "--corpus", text)[0] == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} >= {"state", "figures", "xi"}
    assert not (tmp_path / "~").exists()
    train = tiny(mode="positions", data=DataChoice(corpus=str(text), precomputed="~/xi"))
    assert loader(train, train.model.config(), load_corpus(str(text)))(0).precomputed


def test_closed_streams(command, refused, model, monkeypatch):
    """As a shell's `<&-` and `>&-` leave them."""
    monkeypatch.setattr(sys, "stdin", None)
    assert "prompt: empty" in refused("generate", model, "--backend", "numpy", "--prompt_file", "-")
    sys.stdin.close()
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["list"]) == 0
    sys.stdout.close()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_nothing(unbuffered):
    """A full disk is one line; a reader that has gone, as `head` goes, is none."""
    words = [sys.executable, "-m", "unisono_tools.cli", "--help"]
    how: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, **how)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("unisono: error: No space left on device; ")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, stdout=write, **how)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_inspect(command, model, tmp_path):
    code, out, _ = command("inspect", model, "--out", tmp_path / "figures", "--length", 6)
    assert code == 0
    assert len(list((tmp_path / "figures").glob("*.png"))) == len(out.splitlines())


def test_a_dry_run_says_what_would_be(command, refused, text, tmp_path):
    argv = ("--config", "cram-1m", "--data.corpus", text, "--seq_len", 16, "--batch-size", 4, "--epochs", 2, "--backend", "jax")
    argv = (*argv, "--out", tmp_path / "run")
    code, out, _ = command("train", *argv, "--dry-run")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert "1,060,212 parameters" in lines["model"]
    length = round(0.9 * text.stat().st_size)
    steps = -(-2 * ((length - 1) // 16) // 4)
    assert f"{length:,} tokens to learn from" in lines["corpus"]
    assert lines["steps"].startswith(f"{steps:,} of 64 tokens: {steps * 64:,} in all, 2")
    assert str(tmp_path / "run") in out
    assert not (tmp_path / "run").exists()
    assert "the learning rate never stops rising" in command("train", *argv, "--dry-run", "--schedule.warmup_steps", 10**6)[1]
    assert "seq_len: 100000" in refused("train", *argv, "--dry-run", "--seq_len", 100000)


def test_half_a_surrogate_pair(refused, model):
    assert "half a surrogate pair" in refused("generate", model, "--prompt", "a\ud800", "--backend", "numpy")
    # what Python makes of é where the locale is not UTF-8
    assert "PYTHONUTF8=1" in refused("generate", model, "--prompt", "\udcc3\udca9", "--backend", "numpy")


@pytest.mark.parametrize("stop", [["zz"], ["b c"], ["c", "b"], ["d e", "e f"], ["f"], ["ab cd", "b cx"]])
def test_stop_texts(stop, command, model, monkeypatch):
    text = "ab cd ef"
    monkeypatch.setattr(streaming, "stream", lambda *_: map(_chosen, text.encode()))
    expected = text[: min((text.find(s) for s in stop if s in text), default=len(text))]
    argv = ("generate", model, "--prompt", "> ", "--backend", "numpy", "--stop", json.dumps(stop))
    assert command(*argv)[1] == f"> {expected}\n"


def test_an_empty_stop_text(refused, model):
    assert "stop: '' is in every text" in refused("generate", model, "--stop", '[""]', "--backend", "numpy")
