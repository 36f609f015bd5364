"""Run configs: every problem at once, YAML there and back, what a continued run may change; and the learning rate."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import yaml
from unisono_conformance import numerics
from unisono_spec.contract import InputError, presets
from unisono_tools.commands.arguments import of_class, parse, read_config
from unisono_tools.config import ModelChoice, Optimizer, Schedule, TrainConfig, dump, flatten, from_dict, to_dict
from unisono_tools.data import load_corpus
from unisono_tools.schedule import learning_rate
from unisono_tools.train import checkpoint
from unisono_tools.train.continuing import FREE, check_continues, doubts
from unisono_tools.train.datamodule import TextDataModule


def test_all_problems_are_told_at_once():
    bad = TrainConfig(
        model=ModelChoice("cram-demo", {"d_modle": 3}),
        optimizer=Optimizer(lr=-1, beta2=1.5, eps=math.nan),
        steps=0,
        batch_size=6,
        accumulation=4,
        seed=-1,
        mode="positions",
    )
    with pytest.raises(InputError) as error:
        bad.validate()
    for field in ("optimizer.lr", "optimizer.beta2", "optimizer.eps", "steps", "accumulation", "seed", "data.precomputed", "d_modle"):
        assert f"{field}: " in str(error.value)
    assert "did you mean 'd_model'" in str(error.value)


@pytest.mark.parametrize("name", ["out", "init_from", "device", "wandb_project", "data.tokenizer", "data.precomputed"])
@pytest.mark.parametrize("text", ["", " "])
def test_a_variable_of_the_shell_that_is_not_set_names_nothing(refused, name, text):
    """An empty name of a folder would mean the one that the command is started in."""
    assert f"{name}: {text!r} names nothing" in refused("train", f"--{name}", text)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"devices": 3}, "batch_size: 16 does not divide into 3 parts"),
        ({"devices": 4, "accumulation": 8}, "batch_size: 16 does not divide into 32 parts"),
        ({"devices": 8, "context": 2, "accumulation": 8}, "batch_size: 16 does not divide into 32 parts"),
        ({"devices": 8, "context": 3, "seq_len": 48}, "context: 3 does not divide devices 8"),
    ],
)
def test_what_devices_ask_of_a_batch_is_told_before_they_are_started(more, said):
    with pytest.raises(InputError, match=said):
        TrainConfig(**more).validate()
    TrainConfig(devices=8, context=2, accumulation=4).validate()


@pytest.mark.parametrize(("name", "text"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "-2"), ("RANK", "x"), ("RANK", "1.0"), ("RANK", "2")])
def test_an_environment_that_no_launcher_makes(refused, monkeypatch, name, text):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, text)
    said = refused("train", "--dry-run")
    assert f"{name}: " in said
    assert "start the processes by torchrun" in said


def test_numbers_that_are_too_large(refused, tmp_path):
    assert f"steps: {10**20} is too large" in refused("train", "--steps", 10**20)
    (tmp_path / "text.txt").write_text("some words " * 100)
    assert "epochs: 1e+308 of " in refused("train", "--data.corpus", tmp_path / "text.txt", "--epochs", "1e308", "--seq_len", 8)


def test_positions_need_a_model_whose_xi_is_data():
    data = dataclasses.replace(TrainConfig().data, precomputed="somewhere")
    TrainConfig(mode="positions", data=data).validate()
    for model in (ModelChoice("cram-1m"), ModelChoice("cram-demo", {"codes": "embedding"})):
        with pytest.raises(InputError, match="mode: positions"):
            TrainConfig(model=model, mode="positions", data=data).validate()


def test_yaml_there_and_back():
    config = TrainConfig(model=ModelChoice("cram-1m", {"dropout": 0.1}), optimizer=Optimizer(lr=1e-5), device="cpu", seed=3)
    assert from_dict(yaml.safe_load(dump(config))) == config


def test_packaged_configs_are_valid():
    for name in ("cram-demo", "cram-demo-positions", "cram-1m", "cram-paper", "demo"):
        from_dict(read_config(name)).validate()


def test_every_preset_is_a_config():
    for name, config in presets().items():
        train = from_dict(read_config(name))
        assert train.validate() == config or name in ("cram-paper",)
        assert train.model.preset == name
        assert name in train.out
    with pytest.raises(InputError, match="did you mean 'mamba-1m'") as refused:
        read_config("mamba-1mm")
    valid = str(refused.value).partition("Valid: ")[2].split(", ")
    assert len(set(valid)) == len(valid)


def test_what_is_hardly_meant():
    assert not list(TrainConfig(steps=1000).doubts())
    (said,) = TrainConfig(steps=100).doubts()
    assert "100 of 100 steps" in said


def test_a_home_is_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainConfig(out="~/runs/x").folder == tmp_path / "runs/x"


def test_a_continued_run_may_change_only_what_leaves_its_arithmetic_alone(tiny):
    config = tiny()
    other = {"int": 64, "float": 0.5, "str": "jax", "NoneType": "cpu", "bool": True, "dict": {"d_model": 24}}
    named = {"mode": "positions", "dtype": "float64", "data.limit": 9, "data.eval_window": 9, "backend": "jax"}
    named |= {"parallel": "fsdp", "data.documents": "reset", "data.order": "shuffled", "schedule.kind": "linear", "cuda_graphs": True}
    for name, value in flatten(to_dict(config)).items():
        values = to_dict(config)
        *parents, leaf = name.split(".")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[leaf] = named.get(name, other[type(value).__name__])
        changed = from_dict(values)
        if name in FREE:
            check_continues(changed, config, "here")
        else:
            with pytest.raises(InputError, match=name.replace(".", r"\.")):
                check_continues(changed, config, "here")


def test_defaults_of_the_optimizer():
    """Moments forget sooner than Kingma and Ba's 0.999, and matrices decay by ten times PyTorch's 0.01, as language models are trained."""
    written = {"lr": 2e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
    assert dataclasses.asdict(Optimizer()) == written


def test_an_override_that_is_new_is_named(tiny):
    with pytest.raises(InputError, match=r"model\.overrides\.decay"):
        check_continues(tiny(overrides={"decay": 0.25}), tiny(), "here")


def test_weights_that_learned_other_ids_are_hardly_meant(tiny, made, tmp_path, text):
    checkpoint.save(tmp_path / "first", made(tiny()))
    train = tiny(init_from=str(tmp_path / "first"))

    def told(tokenizer: str) -> list[str]:
        module = TextDataModule(train, train.validate(), load_corpus(text, tokenizer, cache=tmp_path))
        return [doubt for doubt in doubts(train, module) if doubt.startswith("init_from: ")]

    assert not told("bytes")
    (said,) = told("chars")
    assert "learned ids of the tokenizer 'bytes'" in said
    shutil.rmtree(tmp_path / "first")
    assert not told("chars")


def test_learning_rate():
    schedule = Schedule(warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate(step, 110, 2.0, schedule) for step in range(110)]
    assert rates[0] == pytest.approx(0.2, rel=numerics.rounding("float64", 8))
    assert rates[9] == 2.0
    assert rates[59] == pytest.approx((2.0 + 0.2) / 2, rel=numerics.rounding("float64", 8))  # the cosine's middle
    assert rates[-1] == pytest.approx(0.2, rel=numerics.rounding("float64", 8))
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_learning_rate_of_short_runs_is_finite():
    assert [learning_rate(s, 2, 1.0, Schedule(warmup_steps=5)) for s in range(2)] == [0.5, 1.0]
    assert learning_rate(0, 1, 1.0, Schedule(warmup_steps=0, final_fraction=0.5)) == 0.5


@pytest.mark.parametrize("kind", ["linear", "constant"])
def test_other_schedules(kind):
    schedule = Schedule(kind=kind, warmup_steps=10, final_fraction=0.25)
    rates = [learning_rate(step, 110, 2.0, schedule) for step in range(110)]
    assert rates[:10] == [learning_rate(step, 110, 2.0, Schedule(warmup_steps=10)) for step in range(10)]
    if kind == "constant":
        assert set(rates[9:]) == {2.0}
    else:
        assert rates[59] == (2.0 + 0.5) / 2
        assert rates[-1] == 0.5


@pytest.mark.parametrize("changes", [{"batch_size": 10**12}, {"seq_len": 10**15}, {"batch_size": 10**8, "seq_len": 10**8}])
def test_a_batch_that_no_machine_holds_is_refused_before_it_is_drawn(changes):
    with pytest.raises(InputError, match="memory"):
        TrainConfig(**changes).validate()


def test_graphs_are_a_flag_that_can_be_auto():
    arguments = of_class(TrainConfig)
    for words, found in (
        ([], "auto"),
        (["--cuda_graphs"], True),
        (["--cuda_graphs", "--steps", "5"], True),
        (["--cuda_graphs", "false"], False),
        (["--cuda_graphs=auto"], "auto"),
    ):
        config = from_dict(parse("train", "", arguments, words))
        assert config.cuda_graphs is found or config.cuda_graphs == found == "auto"
        assert from_dict(to_dict(config)) == config
    with pytest.raises(InputError, match="cuda_graphs: 'seldom' has type str; give true or false or auto"):
        parse("train", "", arguments, ["--cuda_graphs=seldom"])


def test_names_of_corpora_are_the_users_own():
    arguments = of_class(TrainConfig)
    found = parse(
        "train",
        "",
        arguments,
        ["--data.mixture.wikitext-103-raw-v1", "3", "--data.mixture.a-b/c.txt=0.5", "--model.overrides.d-model", "8"],
    )
    assert found["data"]["mixture"] == {"wikitext-103-raw-v1": 3.0, "a-b/c.txt": 0.5}
    assert found["model"]["overrides"] == {"d_model": 8}
    with pytest.raises(InputError, match=r"data\.mixture\.sotu: 'much' has type str; give a number"):
        parse("train", "", arguments, ["--data.mixture.sotu", "much"])
    with pytest.raises(InputError, match=r"data\.mixture\.sotu: 0\.0; give the share"):
        from_dict(parse("train", "", arguments, ["--data.mixture.sotu", "0"])).validate()
