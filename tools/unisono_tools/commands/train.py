"""unisono train"""

from __future__ import annotations

from pathlib import Path

from unisono_spec.contract import InputError

from unisono_tools.commands.arguments import parse, parser
from unisono_tools.config import TrainConfig, from_dict
from unisono_tools.train import checkpoint, train


def main(argv: list[str]) -> int:
    arguments = parser("train", "Train a model, or continue a run: a run that is in --out already is continued from its last checkpoint.")
    arguments.add_class_arguments(TrainConfig, as_group=False)
    arguments.add_argument(
        "--resume", metavar="RUN", help="continue this run, with its own arguments; others that are given override them where they may"
    )
    run = _resumed(argv)
    values = parse(arguments, argv if run is None else ["--config", str(run / "config.yaml"), *argv, "--out", str(run)])
    values.pop("resume")
    result = train(from_dict(values))
    print(f"checkpoint: {result.checkpoint}")
    if result.best is not None:
        print(f"best: step {result.best.step}, validation loss {result.best.loss:.6f} nats")
    return 0


def _resumed(argv: list[str]) -> Path | None:
    """The run that --resume names, before the other arguments are parsed: its config comes first."""
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag == "--resume":
            if not equals and i + 1 == len(argv):
                raise InputError("resume: which run? give its folder, as in --resume runs/cram-demo")
            run = Path(value if equals else argv[i + 1])
            if checkpoint.latest(run) is None or not (run / "config.yaml").is_file():
                raise InputError(f"resume: {run} holds no run with a checkpoint; give the folder that --out named")
            return run
    return None
