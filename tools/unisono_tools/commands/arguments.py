"""Arguments of a verb, from the signature and docstring of its function, on the command line and in YAML files.

Values are texts, numbers, true, false, lists of texts and names with such values. Whatever their type, none of them names code.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unisono_spec.contract import InputError, nearest, presets
from unisono_spec.contract.errors import shown
from unisono_spec.contract.plain import expanded, expected, read_json, typed

from unisono_tools.commands.elsewhere import known_elsewhere

REQUIRED = dataclasses.MISSING
_INTEGER, _NUMBER = re.compile(r"[-+]?[0-9](_?[0-9]){0,29}"), re.compile(r"[-+]?[0-9._]{1,40}([eE][-+]?[0-9]{1,6})?|[-+]?inf|nan")


@dataclasses.dataclass(frozen=True)
class Argument:
    """name: dotted, as in data.corpus. An argument without a default is positional."""

    name: str
    hint: Any
    default: Any
    help: str

    @property
    def open(self) -> bool:
        """Whether it holds names that its signature does not list."""
        return get_origin(self.hint) is dict or any(get_origin(option) is dict for option in get_args(self.hint))

    @property
    def said(self) -> tuple[str, ...]:
        """What a flag may be followed by, whose value may be left out; of what is no flag, nothing."""
        options = get_args(self.hint) if get_origin(self.hint) in (Union, types.UnionType) else (self.hint,)
        others = (text for option in options if get_origin(option) is Literal for text in get_args(option))
        return ("true", "false", *others) if bool in options else ()


def of_function(function: Callable[..., Any]) -> list[Argument]:
    """One argument for each parameter; help from the docstring's `Args:`."""
    # an argument's text may go on in lines that stand further in
    hints, texts = get_type_hints(function), re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(function) or "", re.MULTILINE)
    helps = {name: " ".join(text.split()) for name, text in texts}
    parameters = inspect.signature(function).parameters.values()
    return [Argument(p.name, hints[p.name], REQUIRED if p.default is p.empty else p.default, helps.get(p.name, "")) for p in parameters]


def of_class(cls: type, prefix: str = "") -> list[Argument]:
    """One argument for each field of a dataclass, and of those within it; help from the texts below the fields."""
    hints, helps, out = get_type_hints(cls), _field_texts(cls), []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            out += of_class(hint, f"{prefix}{field.name}.")
            continue
        default = field.default if field.default_factory is REQUIRED else field.default_factory()
        out.append(Argument(f"{prefix}{field.name}", hint, default, helps.get(field.name, "")))
    return out


def call(verb: str, function: Callable[..., int], argv: list[str]) -> int:
    """Run `function` with arguments from `argv`."""
    return function(**parse(verb, (function.__doc__ or "").split("\n")[0], of_function(function), argv))


def parse(verb: str, description: str, arguments: list[Argument], argv: list[str]) -> dict[str, Any]:
    """Values by name, nested where names are dotted; InputError where one is unknown, missing or of the wrong type."""
    known = {argument.name: argument for argument in arguments}
    positional = [argument.name for argument in arguments if argument.default is REQUIRED]
    values: dict[str, Any] = {}
    given: list[tuple[Argument, str, str]] = []
    left, words = list(positional), list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            _usage(verb, description, arguments)
        if not word.startswith("--"):
            if not left:
                raise InputError(f"{shown(word)}: one argument too many; `unisono {verb} --help` lists them")
            name = left.pop(0)
            given.append((known[name], name, word))
            continue
        name, equals, text = word[2:].partition("=")
        # names within a mapping of numbers are the user's own, such as those of corpora
        own = any(name.startswith(f"{other}.") and get_args(argument.hint)[-1:] == (float,) for other, argument in known.items())
        name = name if name in known or own else name.replace("-", "_")
        argument = None if name == "config" else _named(name, known, positional, verb)
        flag = argument is not None and argument.said and (not words or words[0].lower() not in argument.said)
        if flag and not equals:
            text = "true"
        elif not equals:
            if not words:
                raise InputError(f"{name}: no value; give {expected(argument.hint) if argument else 'a YAML file'}")
            text = words.pop(0)
        if argument is None:
            values |= _flat(read_config(text), arguments, verb=verb)
        else:
            given.append((argument, name, text))
    # what is said word by word stands above what files say, in whatever order
    for argument, name, text in given:
        if argument.name == name:
            values[name] = _from_text(text, argument)
        else:
            key = name.removeprefix(f"{argument.name}.")
            merged = {**(values.get(argument.name, argument.default) or {}), key: _written(text, name)}
            values[argument.name] = typed(merged, argument.hint, argument.name)
    for name in positional:
        if name not in values:
            raise InputError(f"{name}: missing; give {expected(known[name].hint)}, as `unisono {verb} --help` shows")
    return _nested({name: values.get(name, argument.default) for name, argument in known.items()})


def read_config(name: str) -> dict[str, Any]:
    """What `--config` names: a YAML file, one of the configs that come with the tools, or a preset, which is trained as it is."""
    known = {Path(file.name).stem: file for file in resources.files("unisono_tools.configs").iterdir() if file.name.endswith(".yaml")}
    path = expanded(name)
    if path.is_file() or name in known:
        try:
            from unisono_tools.reading import read_yaml
        except ImportError as error:
            raise InputError(f"config: YAML needs {error.name}; pip install 'unisono[tools]', or give the arguments one by one") from error
        return read_yaml(path if path.is_file() else Path(str(known[name])))
    if name in presets():
        return {"model": {"preset": name}, "out": f"runs/{name}"}
    remedy = nearest(name, sorted({*known, *presets()}))
    raise InputError(f"config: {shown(name)} is neither a file nor a preset nor a config that comes with unisono; {remedy}")


def _named(name: str, known: Mapping[str, Argument], positional: list[str], verb: str) -> Argument:
    """The argument that an option sets, or sets one name of."""
    for argument in known.values():
        if argument.name not in positional and (name == argument.name or (argument.open and name.startswith(f"{argument.name}."))):
            return argument
    options = [f"--{other}" for other in known if other not in positional]
    if (here := known_elsewhere(verb, name, known)) is not None:
        raise InputError(f"--{name}: no such argument; here it is {here}")
    meant = next((option for option in options if option.endswith(f".{name}")), f"--{name}")
    raise InputError(f"--{name}: no such argument; {nearest(meant, [*options, '--config'])}")


def _flat(values: Mapping[str, Any], arguments: list[Argument], prefix: str = "", verb: str = "") -> dict[str, Any]:
    """The values of a YAML file by dotted name, each of its argument's type."""
    known, out = {argument.name: argument for argument in arguments}, {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in known:
            out[name] = typed(value, known[name].hint, name)
        elif any(other.startswith(f"{name}.") for other in known):
            if not isinstance(value, Mapping):
                raise InputError(f"{name}: {shown(value)} has type {type(value).__name__}; give names with values")
            out |= _flat(value, arguments, f"{name}.", verb)
        elif (here := known_elsewhere(verb, name, known)) is not None:
            raise InputError(f"{name}: no such argument; here it is {here}")
        else:
            level = {other.removeprefix(prefix).split(".")[0] for other in known if other.startswith(prefix)}
            meant = [other for other in known if other.endswith(f".{name}")]
            raise InputError(f"{name}: no such argument; {nearest(meant[0], known) if meant else nearest(key, level)}")
    return out


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        inner = out
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return out


def _from_text(text: str, argument: Argument) -> Any:
    """What a word of the command line says. Only lists and mappings are read as YAML: a prompt is never anything but a text."""
    return typed(_plain(text, argument.hint, argument.name), argument.hint, argument.name)


def _plain(text: str, hint: Any, name: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        return None if text == "null" and len(options) < len(get_args(hint)) else _plain(text, options[0], name)
    if "\0" in text:
        raise InputError(f"{name}: {shown(text)} holds a NUL character; leave it out")
    if hint is int and _INTEGER.fullmatch(text):
        return int(text)
    if hint is float and _NUMBER.fullmatch(text):
        try:
            return float(text)
        except ValueError:
            return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if origin in (list, dict):
        return _written(text, name)
    return text


def _written(text: str, name: str) -> Any:
    """A list, or names with values, as JSON or else as YAML, whose package `unisono run` does without."""
    try:
        return read_json(text, name, "write JSON, or pip install 'unisono[tools]' and write YAML")
    except InputError:
        if not importlib.util.find_spec("yaml"):
            raise
    from unisono_tools.reading import parse_yaml

    return parse_yaml(text, name)


def _usage(verb: str, description: str, arguments: list[Argument]) -> None:
    """Print the help of a verb, and exit with 0."""
    out = argparse.ArgumentParser(prog=f"unisono {verb}", description=description, allow_abbrev=False)
    out.add_argument("--config", metavar="FILE", help="YAML file of these arguments; those given here override it")
    for argument in arguments:
        text = argument.help.replace("%", "%%").rstrip(".")
        if argument.default is REQUIRED:
            out.add_argument(argument.name, help=text)
        else:
            shape = f"{{{','.join(get_args(argument.hint))}}}" if get_origin(argument.hint) is Literal else expected(argument.hint)
            known = f"{shape}; default {argument.default}".replace("%", "%%")
            flag = bool(argument.said)
            metavar = "|".join(argument.said) if flag else argument.name.split(".")[-1].upper()
            out.add_argument(f"--{argument.name}", nargs="?" if flag else None, metavar=metavar, help=f"{text} ({known})".strip())
    out.print_help()
    raise SystemExit(0)


def _field_texts(cls: type) -> dict[str, str]:
    """The text below each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    out: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            out[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return out
