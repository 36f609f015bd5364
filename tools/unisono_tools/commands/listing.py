"""unisono list"""

from __future__ import annotations

from unisono_spec.contract import count_params, presets

from unisono_tools.commands.arguments import call


def run() -> int:
    """Every preset in one line: its exact parameter count, and the fields that differ from its architecture's defaults."""
    known = presets()
    width = max(map(len, known))
    for name, config in known.items():
        default = type(config)().to_dict()
        changed = [f"{field}={value}" for field, value in config.to_dict().items() if value != default[field]]
        print(f"{name:<{width}}  {count_params(config):>13,}  {config.arch:<14}  {' '.join(map(str.strip, changed))}".rstrip())
    return 0


def main(argv: list[str]) -> int:
    return call("list", run, argv)
