"""unisono plot"""

from __future__ import annotations

from unisono_spec.contract.plain import expanded

from unisono_tools.commands.arguments import call
from unisono_tools.experiments.history import plot as plot_history


def run(run: str, out: str | None = None) -> int:
    """Draw what a run has logged: loss, rate, gradient, speed; decays and gates of InfinityFormer, loads of MARU's banks.

    Args:
        run: folder of a run.
        out: the PNG to write; by default history.png in that folder.
    """
    folder = expanded(run)
    print(plot_history(folder, folder / "history.png" if out is None else expanded(out)))
    return 0


def main(argv: list[str]) -> int:
    return call("plot", run, argv)
