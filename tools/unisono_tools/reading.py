"""YAML as configs need it: text, numbers, true, false, null, lists and mappings of YAML 1.2. No tags, aliases or names given twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from unisono_spec.contract import InputError
from unisono_spec.contract.errors import shown
from unisono_spec.contract.plain import MAX_DEPTH, check_plain, read_file

MAX_BYTES = 1 << 18  # a config has some hundred bytes
REMEDY = "correct the file"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without what a config never needs."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's way)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read", self.peek_event().start_mark)
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, "anchors are not read", event.start_mark)
        if (tag := getattr(event, "tag", None)) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"tags are not read: {shown(tag)}", event.start_mark)
        if self.depth > MAX_DEPTH:
            raise yaml.constructor.ConstructorError(None, None, f"nested more than {MAX_DEPTH} deep", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        found: dict = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name is not a text", key_node.start_mark)
            if key_node.value in found:
                raise yaml.constructor.ConstructorError(None, None, f"{shown(key_node.value)} is given twice", key_node.start_mark)
            found[key_node.value] = self.construct_object(value_node, deep=True)
        return found

    def construct_yaml_map(self, node: Any) -> Any:
        yield self.construct_mapping(node)

    def construct_yaml_int(self, node: Any) -> int:
        text = node.value
        if len(text) > 30:
            raise yaml.constructor.ConstructorError(None, None, f"an integer of {len(text)} digits", node.start_mark)
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)

    def construct_yaml_float(self, node: Any) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


# the core schema of YAML 1.2: 2e-3 is a number, and `no`, 1:30 and 2001-01-01 are texts
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def read_yaml(path: Path) -> dict[str, Any]:
    """The names and values in a YAML file; InputError, which names the file, on anything else."""
    data = read_file(path, "give a YAML file of arguments", MAX_BYTES)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not YAML (byte {error.start} is not UTF-8); {REMEDY}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {type(values).__name__}, not names with values; write lines such as `steps: 1000`")
    return values


def parse_yaml(text: str, source: str) -> Any:
    """The plain value that `text` writes."""
    loader = None
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: not YAML that is read here ({' '.join(str(error).split())}); {REMEDY}") from error
    finally:
        if loader is not None:
            loader.dispose()
    check_plain(value, source, REMEDY)
    return value


def dump_yaml(values: dict[str, Any]) -> str:
    """As text that `read_yaml` reads as it was."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
