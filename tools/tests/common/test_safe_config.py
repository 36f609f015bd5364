"""No value of a configuration imports or makes anything, whatever field it stands in, wherever the file comes from."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys

import pytest
import yaml
from unisono_spec.contract import Config, InputError, preset
from unisono_tools import cli
from unisono_tools.commands.arguments import Argument, of_class, of_function, parse
from unisono_tools.config import TrainConfig, from_dict, to_dict
from unisono_tools.tasks import open_task
from unisono_tools.train import checkpoint

TRAP = "trap_of_a_stranger"
VERBS = ("evaluate", "generate", "precompute", "export", "listing", "match", "compare", "inspect", "task")
# what makes other readers of YAML import: paths of classes in all spellings, PyYAML's tags, what Hydra and others resolve
SPEC = {"class_path": f"{TRAP}.X"}
VALUES = (
    SPEC,
    {**SPEC, "init_args": {"a": 1}},
    {"_target_": f"{TRAP}.X"},
    {"__class__": f"{TRAP}.X"},
    [SPEC],
    {"a": SPEC},
    {"decay": SPEC},
    {"a": [SPEC]},
)
TAGS = (
    f"!!python/name:{TRAP}.X",
    f"!!python/module:{TRAP}",
    f"!!python/object:{TRAP}.X {{}}",
    f"!!python/object/new:{TRAP}.X [1]",
    f"!!python/object/apply:{TRAP}.X [1]",
    "!!binary aGVsbG8=",
    "!X {a: 1}",
)


@pytest.fixture(autouse=True)
def trap(tmp_path, monkeypatch):
    """A module that says whether it was imported."""
    (tmp_path / f"{TRAP}.py").write_text("class X:\n    def __init__(self, *args, **kwargs):\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, TRAP, raising=False)
    yield
    assert TRAP not in sys.modules
    assert importlib.util.find_spec(TRAP)  # it could have been


@functools.cache
def _arguments(verb: str) -> list[Argument]:
    return of_class(TrainConfig) if verb == "train" else of_function(importlib.import_module(f"unisono_tools.commands.{verb}").run)


def _model(values: dict) -> Config:
    """Names of a model's fields are known to the model alone, those of a task's to the task."""
    open_task("mqar", values.get("data", {}).get("task_options"))
    return preset("cram-demo", **values.get("model", values)["overrides"])


def _nested(name: str, value: object) -> dict:
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


FIELDS = [(verb, argument.name) for verb in ("train", *VERBS) for argument in _arguments(verb)]


@pytest.mark.parametrize(("verb", "name"), FIELDS)
def test_every_field(verb, name, tmp_path):
    path = tmp_path / "config.yaml"
    texts = [yaml.safe_dump(_nested(name, value)) for value in VALUES]
    texts += [yaml.safe_dump(_nested(name, "TAG")).replace("TAG", tag) for tag in TAGS]
    for text in texts:
        path.write_text(text)
        with pytest.raises(InputError):
            _model(parse(verb, "", _arguments(verb), ["--config", str(path)]))


@pytest.mark.parametrize("where", [(), ("model",), ("data",), ("optimizer",), ("schedule",)])
@pytest.mark.parametrize("value", VALUES)
def test_every_section(where, value, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_nested(".".join(where), value) if where else value))
    with pytest.raises(InputError):
        parse("train", "", of_class(TrainConfig), ["--config", str(path)])


@pytest.mark.parametrize("field", ["decay", "d_model", "codes", "tie_head"])
def test_the_command(field, refused, tiny, made, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{overrides: {{{field}: {{class_path: {TRAP}.X}}}}}}\n")
    assert f"model.overrides.{field}: " in refused("train", "--config", path, "--out", tmp_path / "new")
    assert "class_path" in refused("train", f"--model.overrides.{field}", f"{{class_path: {TRAP}.X}}", "--out", tmp_path / "new")
    train = tiny()
    run = tmp_path / "run"
    checkpoint.save(run, made(train))
    values = to_dict(train)
    values["model"]["overrides"][field] = SPEC
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert f"model.overrides.{field}: " in refused("train", "--resume", run)


def test_the_checkpoint_of_a_stranger(tiny):
    for name in ("model", "data", "optimizer", "steps", "out"):
        with pytest.raises(InputError):
            from_dict({**to_dict(tiny()), name: SPEC})


def test_words_are_words(tmp_path):
    """A text that looks like a class is a text."""
    path = tmp_path / "config.yaml"
    path.write_text(f"data: {{corpus: {TRAP}.X}}\nbackend: jax\n")
    values = parse("train", "", of_class(TrainConfig), ["--config", str(path), "--init_from", f"{TRAP}.X"])
    assert values["data"]["corpus"] == values["init_from"] == f"{TRAP}.X"
    assert cli.main(["train", "--config", str(path)]) == 2
