"""unisono list"""

from __future__ import annotations

import collections
import shutil
import sys
from typing import Any

from unisono_spec.contract import count_params, presets

from unisono_tools.commands.arguments import call


def run() -> int:
    """Every preset in one line: its exact parameter count, and the fields that differ from its architecture's defaults.

    On a terminal a line ends where the terminal does.
    """
    known = presets()
    width = max(map(len, known))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, config in known.items():
        default = type(config)().to_dict()
        changed = [f"{field}={_shown(value)}" for field, value in config.to_dict().items() if value != default[field]]
        line = f"{name:<{width}}  {count_params(config):>13,}  {config.arch:<14}  {' '.join(changed)}".rstrip()
        print(line if columns is None or len(line) <= columns else f"{line[: columns - 1]}…")
    return 0


def _shown(value: Any) -> str:
    """A layer's kinds by their numbers, in the order in which each comes first."""
    if isinstance(value, list | tuple):
        return "+".join(f"{number}×{kind}" for kind, number in collections.Counter(value).items())
    return str(value).strip()


def main(argv: list[str]) -> int:
    return call("list", run, argv)
