"""unisono list"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from unisono_spec.contract import count_params, presets

from unisono_tools.commands.arguments import call


def run() -> int:
    """Every preset, with its exact parameter count and the fields that differ from its architecture's defaults."""
    table = Table("preset", "architecture", "parameters", "fields")
    table.columns[2].justify = "right"
    for name, config in presets().items():
        default = type(config)().to_dict()
        changed = {field: value for field, value in config.to_dict().items() if value != default[field]}
        table.add_row(name, config.arch, f"{count_params(config):,}", ", ".join(f"{f}={v}" for f, v in changed.items()))
    Console().print(table)
    return 0


def main(argv: list[str]) -> int:
    return call("list", run, argv)
