"""Equal models under one budget."""

from __future__ import annotations

import json

import numpy as np
import pytest
from unisono_tools.config import from_dict, to_dict
from unisono_tools.experiments import compare, figures
from unisono_tools.experiments.match import FAMILIES, match
from unisono_tools.experiments.ngrams import witten_bell
from unisono_tools.train.continuing import check_continues
from unisono_tools.train.logs import read


def test_models_see_the_same_tokens_and_are_drawn(backend, command, text, tmp_path, monkeypatch):
    two = ("cram (fixed)", "cram (adaptive)")
    monkeypatch.setattr(compare, "match", lambda params, vocab: {n: c for n, c in match(100_000, vocab).items() if n in two})
    monkeypatch.setattr("unisono_tools.experiments.match.FAMILIES", {n: f for n, f in FAMILIES.items() if n in two})
    argv = (
        "compare",
        "--corpus",
        text,
        "--steps",
        4,
        "--batch_size",
        2,
        "--seq_len",
        16,
        "--backend",
        backend,
        "--seeds",
        2,
        "--out",
        tmp_path / "out",
    )
    code, out, _ = command(*argv)
    assert code == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert set(found["run"]) == {"command", "date", "device", "versions", "commit", "seeds"}
    assert "--steps 4 --batch_size 2 --seq_len 16" in found["run"]["command"]
    assert {curve["model"] for curve in found["curves"]} == {"cram (fixed)", "cram (adaptive)"}
    for curve in found["curves"]:
        assert curve["tokens"][-1] == 4 * 2 * 16
        assert f"{curve['parameters']:,}" in out
        # two seeds: a mean and how far they lie apart
        assert curve["seeds"] == 2
        assert curve["low"][-1] < curve["bits"][-1] < curve["high"][-1]
        assert f"({curve['low'][-1]:.3f}–{curve['high'][-1]:.3f})" in out
        logs = [tmp_path / "out" / f"{''.join(c if c.isalnum() else '-' for c in curve['model'])}{end}" for end in ("", "-seed-1")]
        assert curve["low"][-1] in [row["validation_bits"] for log in logs for row in read(log / "log.jsonl") if "validation_bits" in row]
    # the order counts the bytes of context, the name also the one that follows
    bits = witten_bell(np.frombuffer(text.read_bytes(), np.uint8)[:3204], np.frombuffer(text.read_bytes(), np.uint8)[3204:3382], 3)
    assert found["baselines"] == {"2-gram": bits[1], "3-gram": bits[2], "4-gram": bits[3]}
    assert [c["bits"][-1] for c in found["curves"]] == sorted(c["bits"][-1] for c in found["curves"])
    for picture in ("compare.png", "dependency.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    # runs that are whole are read again, not trained again
    assert command(*argv)[1].splitlines()[-1] == out.splitlines()[-1]


def test_an_unknown_model_is_refused(refused):
    assert "'lstm' is unknown" in refused("compare", "--models", '["lstm"]')
    assert "jobs: 0; use a positive number" in refused("compare", "--jobs", "0")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_has_a_plan(name, tmp_path):
    config = match(1_000_000, 256)[name] if name == "cram (fixed)" else None
    if config is None:
        family = FAMILIES[name]
        chosen = {field: values[0] for field, values in family.options.items() if values}
        config = family.config(256, 64, 2, chosen)
    plan = compare.plan(name, config, tmp_path, "sotu", 10, 2, 16, 1e-3, "torch")
    assert plan.validate() == config
    check_continues(plan, from_dict(json.loads(json.dumps(to_dict(plan)))), "the run's checkpoint")


def test_no_look_comes_twice():
    for group in (FAMILIES, figures.CONTESTANTS, figures.ATTENTIONS):
        looks = [tuple(figures.look(f"{name}  1.23" if name in FAMILIES else name).values()) for name in group]
        assert len(set(looks)) == len(looks)
    colours = {figures.look(name)["color"] for name in FAMILIES}
    assert len(colours) == len(FAMILIES)
    assert len(set(figures.DTYPES.values())) == len(figures.DTYPES)
