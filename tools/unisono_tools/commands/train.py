"""unisono train"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.backends import backend
from unisono_tools.commands.arguments import Argument, of_class, parse
from unisono_tools.config import TrainConfig, default_backend, from_dict, processes
from unisono_tools.tasks import open_task
from unisono_tools.train import checkpoint, train
from unisono_tools.train.outlook import gigabytes, outlook


def main(argv: list[str]) -> int:
    run, given = _resumed(argv)
    arguments = [
        *of_class(TrainConfig),
        Argument("resume", str | None, None, "continue this run, with its own arguments; others override them where they may"),
    ]
    arguments.append(Argument("dry_run", bool, False, "say what would be trained, how long and where it is written, and stop"))
    about = "Train a model, or continue a run: a run that is in --out already is continued from its last checkpoint."
    values = parse("train", about, arguments, given if run is None else ["--config", str(run / "config.yaml"), *given, "--out", str(run)])
    if values.pop("resume") is not None:
        raise InputError("resume: it belongs on the command line, not into a file; run `unisono train --resume RUN`")
    dry = values.pop("dry_run")
    plan = from_dict(values)
    if dry:
        for what, how_much in outlook(plan):
            print(f"{what:<12} {how_much}")
        return 0
    if plan.devices > 1 and processes()[1] == 1 and (plan.backend or default_backend(training=True)) == "torch":
        backend("torch")
        # in the place of this process, so that signals reach what passes them on
        # the machine's own name, which torchrun would tell the others, need not resolve where there is no network
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        launch += ["--nproc-per-node", str(plan.devices)]
        sys.stdout.flush()
        os.execv(sys.executable, [*launch, "-m", "unisono_tools.cli", "train", *argv])
    result = train(plan)
    first = processes()[0] == 0  # of several processes, one speaks
    if first:
        print(f"checkpoint: {result.checkpoint}")
    if result.best is not None and first:
        score = "" if result.best.score is None else f"{open_task(str(plan.data.task)).metric} {result.best.score:.6f}, "
        print(f"best: step {result.best.step}, {score}validation loss {result.best.loss:.6f} nats")
    name = plan.backend or default_backend()
    if first:
        print(f"memory: at most {gigabytes(backend(name).peak_bytes())}")
    # as a shell reports a process that the signal ended
    code = 0 if result.signal is None else 128 + result.signal
    if processes()[1] > 1 and name == "torch":
        backend(name).leave(code)
    return code


def _resumed(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The run that --resume names, whose config comes before the other arguments; those others."""
    flags = [word.partition("=")[0] for word in argv]
    if "--resume" in flags and (flags.count("--resume") > 1 or "--out" in flags):
        raise InputError("resume: given twice, or beside --out; name one run: --resume continues it where it lies")
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag != "--resume":
            continue
        if not equals and i + 1 == len(argv):
            raise InputError("resume: which run? give its folder, as in --resume runs/cram-demo")
        name = value if equals else argv[i + 1]
        if not name.strip():
            raise InputError(f"resume: {name!r} names no run; give its folder")
        run = expanded(name)
        if checkpoint.latest(run) is None or not (run / "config.yaml").is_file():
            raise InputError(f"resume: {run} holds no run with a checkpoint; give the folder that --out named")
        return run, [*argv[:i], *argv[i + (1 if equals else 2) :]]
    return None, argv
