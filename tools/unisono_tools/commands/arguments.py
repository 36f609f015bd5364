"""Arguments of a verb, from the signature and docstring of its function, by jsonargparse."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from unisono_spec.contract import InputError, nearest

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parser(verb: str, description: str) -> ArgumentParser:
    """A parser that raises instead of exiting, and reads YAML files with --config."""
    out = ArgumentParser(prog=f"unisono {verb}", description=description, exit_on_error=False)
    out.add_argument("--config", action="config", help="YAML file of these arguments; later arguments override it")
    return out


def parse(arguments: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Plain values by name; InputError where an argument is unknown or has the wrong type."""
    try:
        values = arguments.parse_args(named_configs(argv))
    except ArgumentError as error:
        raise InputError(f"{error.message}; see --help") from error
    return {name: value for name, value in values.as_dict().items() if name != "config"}


def call(verb: str, function: Callable[..., int], argv: list[str]) -> int:
    """Run `function` with arguments from `argv`: what has no default is positional."""
    arguments = parser(verb, (function.__doc__ or "").split("\n")[0])
    arguments.add_function_arguments(function, as_group=False, as_positional=True)
    return function(**parse(arguments, argv))


def named_configs(argv: list[str]) -> list[str]:
    """`--config NAME` may name one of the configs that come with the tools."""
    out = list(argv)
    known = {Path(file.name).stem: file for file in resources.files("unisono_tools.configs").iterdir() if file.name.endswith(".yaml")}
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag != "--config" or (not equals and i + 1 == len(argv)):
            continue
        name = value if equals else argv[i + 1]
        if Path(name).is_file():
            _check_yaml(Path(name))
            continue
        if name not in known:
            raise InputError(f"config: {name!r} is neither a file nor one of the configs that come with unisono; {nearest(name, known)}")
        if equals:
            out[i] = f"--config={known[name]}"
        else:
            out[i + 1] = str(known[name])
    return out


def _check_yaml(path: Path) -> None:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error}); correct the file") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {type(values).__name__}, not names with values; write lines such as `steps: 1000`")
