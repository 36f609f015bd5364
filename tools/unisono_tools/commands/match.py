"""unisono match"""

from __future__ import annotations

import json
import re
import shlex

from rich.console import Console
from rich.table import Table
from unisono_spec.contract import InputError, config_to_dict, count_params, preset

from unisono_tools.commands.arguments import call
from unisono_tools.experiments.match import FAMILIES, match

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def run(params: str = "1M", vocab: int = 256, heads: str | None = None, as_json: bool = False) -> int:
    """A config of each model with nearly the same number of parameters, for a fair comparison.

    Args:
        params: how many, such as 1M, 1.5M or 1000000; each model's count is within 0.5 % of it
        vocab: size of the vocabulary, 256 for bytes
        heads: alike (as the Transformer's), usual (as presets have them), tied (one table for embedding and head) or own (two, of which
            only the head's is computed with); else alike from 32M parameters on, and usual below
        as_json: print whole configs, one JSON object by model, instead of a table
    """
    configs = match(number(params), vocab, heads)
    if as_json:
        print(json.dumps({name: config_to_dict(config) for name, config in configs.items()}, indent=1))
        return 0
    table = Table("model", "parameters", "unisono train …")
    table.columns[1].justify = "right"
    for name, config in configs.items():
        base = FAMILIES[name].base
        table.add_row(name, f"{count_params(config):,}", " ".join([f"--model.preset {base}", *_overrides(base, config.to_dict())]))
    Console(soft_wrap=True).print(table)
    return 0


def _overrides(base: str, fields: dict) -> list[str]:
    """As a shell takes them."""
    default = preset(base).to_dict()
    written = {name: shlex.quote(json.dumps(value, separators=(",", ":")).strip('"')) for name, value in fields.items()}
    return [f"--model.overrides.{name} {written[name]}" for name, value in fields.items() if value != default[name]]


def number(text: str) -> int:
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmb]?)\s*", text.lower().replace("_", ""))
    if found is None:
        raise InputError(f"params: {text!r}; write a number such as 1M, 1.5M or 1000000")
    return round(float(found[1]) * UNITS[found[2]])


def main(argv: list[str]) -> int:
    return call("match", run, argv)
