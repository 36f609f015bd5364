"""unisono inspect"""

from __future__ import annotations

from unisono_spec.contract import InputError, nearest, presets
from unisono_spec.contract.errors import shown
from unisono_spec.contract.plain import expanded

from unisono_tools.commands.arguments import call
from unisono_tools.experiments.inspect import inspect
from unisono_tools.train.checkpoint import model_file


def run(model: str, out: str = "inspect", length: int = 48) -> int:
    """Draw what a model can see, as PNGs: its dependency matrix, and how far back one input bit still changes its state.

    Args:
        model: folder of a run or of a checkpoint, a .safetensors file, or the name of a preset (as initialised).
        out: folder of the PNGs.
        length: tokens of the dependency matrix.
    """
    if model not in presets() and not expanded(model).exists():
        raise InputError(
            f"model: {shown(model)} is neither a preset nor a run's folder nor a .safetensors file; {nearest(model, presets())}"
        )
    target = model if model in presets() else model_file(expanded(model))
    for name, path in inspect(target, expanded(out), length).items():
        print(f"{name}: {path}")
    return 0


def main(argv: list[str]) -> int:
    return call("inspect", run, argv)
