"""Fair comparisons: a config of each model with the same number of parameters."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from unisono_spec.contract import ARCHITECTURES, InputError, config_from_dict, count_params
from unisono_tools.commands import match as commands_match
from unisono_tools.experiments.match import FAMILIES, match, nearest


def test_counts_agree(command):
    code, out, _ = command("match", "--params", "1M", "--vocab", "256", "--as_json", "true")
    configs = {name: config_from_dict(fields) for name, fields in json.loads(out).items()}
    counts = {name: count_params(config) for name, config in configs.items()}
    assert code == 0
    assert list(configs) == list(FAMILIES)
    assert {config.arch for config in configs.values()} == set(ARCHITECTURES)
    assert max(counts.values()) <= 1.01 * min(counts.values()), counts
    assert all(200 * abs(count - 10**6) <= 10**6 for count in counts.values()), counts
    assert {config.vocab_size for config in configs.values()} == {256}


def test_table_is_what_train_takes(command, monkeypatch):
    monkeypatch.setattr("unisono_tools.experiments.match.FAMILIES", {"mamba": FAMILIES["mamba"]})
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = command("match", "--params", "1_000k")
    (config,) = match(1_000_000, 256).values()
    assert code == 0
    assert f"{count_params(config):,}" in out
    assert "--model.preset mamba-1m" in out
    assert f"--model.overrides.d_model {config.d_model}" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--params", "lots"), "params: 'lots'"),
        (("--vocab", "0"), "vocab: 0"),
        (("--heads", "shared"), "heads: 'shared' is unknown"),
        (("--params", "9"), "of 9; ask for more"),
        (("--vocab", "1_000_000"), "of 1,000,000; ask for more"),
        (("--heads", "tied"), "of 1,000,000, the nearest 1,024,640; ask for more, or for heads alike"),
    ],
)
def test_refusals(refused, argv, said):
    assert said in refused("match", *argv)


@pytest.mark.parametrize("heads", [None, "alike", "usual", "tied", "own"])
def test_heads_are_alike_where_they_are_asked_to_be(heads: str | None):
    """From 32M parameters on by themselves; families without a choice are as they are."""
    found = {
        name: nearest(name, 70_400_000, 50257, heads).to_dict()["tie_head"] for name in ("transformer", "lat", "infinityformer", "mamba")
    }
    usual = {"transformer": False, "lat": False, "infinityformer": True, "mamba": True}
    assert found == (usual if heads == "usual" else dict.fromkeys(usual, heads == "tied"))
    for name in ("cram (fixed)", "maru"):
        assert nearest(name, 70_400_000, 50257, heads) == nearest(name, 70_400_000, 50257, "usual")


def test_small_models_have_their_usual_heads_unless_asked(command):
    usual, alike = (
        {name: config.to_dict().get("tie_head") for name, config in match(10**6, 256, heads).items()} for heads in (None, "alike")
    )
    assert [(found["transformer"], found["infinityformer"]) for found in (usual, alike)] == [(False, True), (False, False)]
    code, out, _ = command("match", "--params", "1M", "--heads", "alike", "--as_json", "true")
    assert code == 0
    assert {name: fields.get("tie_head") for name, fields in json.loads(out).items()} == alike


def test_a_family_without_such_a_config_keeps_its_usual_head():
    usual = nearest("based", 32_000_000, 4096, "usual")
    assert nearest("transformer", 32_000_000, 4096).to_dict()["tie_head"] is False
    with pytest.raises(InputError, match="no based model"):
        nearest("based", 32_000_000, 4096, "own")
    assert nearest("based", 32_000_000, 4096) == usual
    assert usual.to_dict()["tie_head"] is True


def test_more_than_any_shape_has():
    with pytest.raises(InputError, match="of 100,000,000,000; ask for fewer"):
        nearest("cram (adaptive)", 10**11, 256)


def test_refusals_under_python_o():
    """Which leaves asserts out."""
    module: dict[str, object] = {"__name__": "optimised"}
    exec(compile(inspect.getsource(commands_match), "match.py", "exec", optimize=1), module)
    number: Any = module["number"]
    assert number("1.5M") == 1_500_000
    for text in ("lots", "", ".", "1.5.5", "M"):
        with pytest.raises(InputError, match="write a number such as"):
            number(text)
