"""The training loop: from a TrainConfig to weights, by any backend that has gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from unisono_spec.contract import Arrays, Config, InputError, config_to_dict, init_params
from unisono_spec.contract.files import load_params, save_arrays, write_bytes
from unisono_spec.contract.plain import expanded

from unisono_tools.backends import open_trainer
from unisono_tools.backends.base import Batch, Pending, Trainer
from unisono_tools.config import TrainConfig, default_backend, dump, processes, to_dict
from unisono_tools.data import Corpus, Mixture
from unisono_tools.schedule import learning_rate
from unisono_tools.signals import Signals, Stopped
from unisono_tools.train import checkpoint as checkpoints
from unisono_tools.train.checkpoint import Best, Checkpoint
from unisono_tools.train.continuing import check_same_run, doubts, stopping
from unisono_tools.train.datamodule import DataModule, TextDataModule
from unisono_tools.train.datamodule import load as load_data
from unisono_tools.train.gauges import gauges
from unisono_tools.train.guard import alone_in
from unisono_tools.train.logs import NAME as LOG
from unisono_tools.train.logs import Log
from unisono_tools.train.progress import ProgressBar
from unisono_tools.train.task_datamodule import TaskDataModule
from unisono_tools.voice import Voice

AHEAD = 2  # steps
# what nanoGPT's init_from may be
ELSEWHERE = {
    "scratch": "leave it out: weights are drawn with the seed",
    "resume": "use --resume RUN, or the same command again: a run that is in --out is continued",
    **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "no preset is that model; give a run or a file of one of ours"),
}


class Diverged(InputError):
    """The loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """checkpoint: the folder of the last one. best: the lowest validation loss, in nats a target. steps: how many were done, of how many.

    why: what the validation said that ended the run early. signal: the one that did.
    """

    run: Path
    checkpoint: Path
    best: Best | None
    steps: int
    of: int
    why: str | None = None
    signal: signal.Signals | None = None


def train(train: TrainConfig, corpus: Corpus | Mixture | None = None, console: Console | None = None, seconds: float = math.inf) -> Result:
    """Train as `train` says, or continue the run that is in its folder already.

    corpus: what `train.data.corpus` names, where the caller has loaded it. seconds: after so many, the run stops at its next step, with
    a checkpoint. SIGINT, SIGTERM and what else schedulers send end it likewise. Every random number is a function of (seed, step), so
    a continued run ends with the same weights as one that was never interrupted, bit for bit on equal software and thread count.
    """
    console = console or Voice(stderr=True, quiet=processes()[0] > 0)
    config, run = train.validate(), train.folder
    datamodule = open_datamodule(train, config, corpus)
    train = dataclasses.replace(train, steps=datamodule.steps)
    for doubt in doubts(train, datamodule):
        console.print(f"warning: {doubt}", highlight=False, markup=False, soft_wrap=True)
    seconds = min(seconds, 60 * train.max_minutes or math.inf)
    first = processes()[0] == 0
    # of several processes that torchrun starts, the first one holds the folder and writes
    with alone_in(run) if first else contextlib.nullcontext():
        found = checkpoints.newest(run)
        last, before, damaged = found or (None, None, [])
        if before is not None:
            check_same_run(train, datamodule, before, str(last))
        trainer = open_trainer(train, config)
        if before is None:
            trainer.init(initial(train, config))
        else:
            trainer.init(before.params, before.optimizer, before.carried, before.average)
        if first:
            checkpoints.sweep(run)
        for complaint in damaged:
            console.print(f"warning: {complaint}; going back to {last}", highlight=False, markup=False, soft_wrap=True)
        if before is not None and not before.unjudged and last is not None:
            why = stopping(train, before.step, before.best)
            if before.step >= train.steps or why:
                over = f"{why}; raise --patience or --enough" if why else f"all {train.steps} steps are done; raise --steps"
                console.print(f"{last}: {over} to train on", highlight=False, markup=False, soft_wrap=True)
                return Result(run, last, before.best, before.step, train.steps, None if before.step >= train.steps else why)
        if first:
            write_bytes(run / "config.yaml", dump(train).encode())
        with Signals() as signals:
            return Run(train, config, datamodule, trainer, before, last, console, time.monotonic() + seconds, signals).finish()


def open_datamodule(train: TrainConfig, config: Config, corpus: Corpus | Mixture | None = None) -> DataModule:
    """What a run learns from. corpus: what `train.data` names, where the caller has loaded it."""
    if train.data.task:
        return TaskDataModule(train, config)
    return TextDataModule(train, config, load_data(train.data) if corpus is None else corpus)


class _Asked(NamedTuple):
    """A step that the device was told to take, and whose numbers have not been read yet."""

    step: int
    batch: Batch
    lr: float
    numbers: Pending


class Run:
    """A run in progress: what changes from step to step.

    The host runs ahead of the device by up to AHEAD steps, so that the device never waits for a batch; it reads the numbers of a step once
    those are there, and waits for all of them before it evaluates or saves.
    """

    def __init__(
        self,
        train: TrainConfig,
        config: Config,
        datamodule: DataModule,
        trainer: Trainer,
        before: Checkpoint | None,
        last: Path | None,
        console: Console,
        deadline: float,
        signals: Signals,
    ) -> None:
        self.deadline, self.signals, self.late, self.ended, self.why = deadline, signals, False, False, None
        self.asked: deque[_Asked] = deque()
        self.row: dict[str, float] = {}
        self.skipped = 0 if before is None else int(before.optimizer.get("skipped", [0])[0])
        self.train, self.config, self.datamodule, self.trainer = train, config, datamodule, trainer
        self.folder, self.last = train.folder, last
        self.done, self.best = (0, None) if before is None else (before.step, before.best)
        self.unjudged = before is not None and before.unjudged
        self.progress = ProgressBar(self.done, train.steps, "positions" if train.mode == "positions" else "tokens", console)
        self.writes = trainer.rank == 0
        self.log = Log(self.folder, self.done, train.wandb_project, to_dict(train)) if self.writes else None
        for line in self.log.damaged if self.log else ():
            self.progress.say(f"{self.folder / LOG}: line {line} was damaged, and is left out")
        if before is not None:
            self.progress.say(f"continuing {self.last}")
            if before.threads != trainer.threads:
                self.progress.say(f"begun with {before.threads} threads, continued with {trainer.threads}: the last bits will differ")
            self._warn_of_a_jump(before.train)

    def _warn_of_a_jump(self, before: TrainConfig) -> None:
        """Another number of steps is another schedule."""
        planned = learning_rate(min(self.done, before.steps - 1), before.steps, before.optimizer.lr, before.schedule)
        rate = learning_rate(self.done, self.train.steps, self.train.optimizer.lr, self.train.schedule)
        if rate != planned:
            self.progress.say(
                f"warning: planned for {before.steps} steps, now for {self.train.steps}: the learning rate jumps from {planned:.3g} to "
                f"{rate:.3g} at step {self.done + 1}"
            )

    def finish(self) -> Result:
        try:
            with self.progress:
                if self.unjudged:
                    self._make_up()
                while not self.ended:
                    self.step(self.datamodule.batch(self.done))
        finally:
            if self.log is not None:
                self.log.close()
        # all wait for what the first one writes, and end alike: torchrun would wait on other machines for those that ended well
        signalled = self.trainer.any(self.signals.received is not None)
        self.last = self.last or checkpoints.latest(self.folder)
        assert self.last is not None
        if signalled and self.done < self.train.steps:
            received, again = self.signals.received or signal.SIGTERM, f"unisono train --resume {shlex.quote(str(self.folder))}"
            self.progress.say(f"{received.name}: stopped at step {self.done}, which is saved; `{again}` continues")
            return Result(self.folder, self.last, self.best, self.done, self.train.steps, signal=received)
        if self.late:
            again = "; the same command continues" * (self.train.max_minutes > 0)
            self.progress.say(f"out of time: stopped at step {self.done}, which is saved{again}")
        return Result(self.folder, self.last, self.best, self.done, self.train.steps, self.why)

    def _make_up(self) -> None:
        """Evaluate what a signal left out, so that the best and the log are those of a run without one."""
        last = self.done == self.train.steps
        self._evaluate()
        over = self._is_over(last)
        self.ended = self.trainer.any(last or over or self.signals.received is not None)
        if self.ended:
            self._save()

    def step(self, batch: Batch) -> None:
        train = self.train
        lr = learning_rate(self.done, train.steps, train.optimizer.lr, train.schedule)
        self.asked.append(_Asked(self.done + 1, batch, lr, self.trainer.grad_step(batch, self.done, lr)))
        self.done += 1
        while self.trainer.notes:
            self.progress.say(self.trainer.notes.pop(0))
        self.read(AHEAD)
        last = self.done == train.steps
        # one answer for all processes
        self.late = time.monotonic() > self.deadline and not last
        self.ended = self.trainer.any(last or self.late or self.signals.received is not None)
        signalled = self.ended and self.trainer.any(self.signals.received is not None)
        due = (self.ended or self.done % train.eval_every == 0) and not signalled
        if due or self.ended or self.done % train.checkpoint_every == 0:
            self.read(0)
        self.unjudged = last or self.done % train.eval_every == 0
        better = due and self._evaluate()
        if due:
            self.ended |= self._is_over(last)
            better = self.trainer.any(better)  # what is saved lies with all of them
            # a signal may have come while evaluating
            self.ended = self.trainer.any(self.ended or self.signals.received is not None)
        if self.ended:
            self._log_last()
        if self.ended or better or self.done % train.checkpoint_every == 0:
            self._save()

    def read(self, ahead: int) -> None:
        """Read the numbers of all steps but the last `ahead`; Diverged where they are none."""
        while len(self.asked) > ahead:
            asked = self.asked.popleft()
            result = asked.numbers.read()
            if result.diverged or (result.skipped and self.train.dtype != "float16"):
                name, value = ("gradient's norm", result.norm) if math.isfinite(result.loss) else ("loss", result.loss)
                kept = self._kept() + (f"; its batch is {self._keep(asked)}" if self.writes else "")
                raise Diverged(f"{name}: {value} at step {asked.step}; {kept}; lower optimizer.lr or lengthen schedule.warmup_steps")
            self.skipped += result.skipped
            targets = asked.batch.targets.shape
            self.progress.step(asked.step, result.loss, targets[0] * (1 if asked.batch.precomputed else targets[1]))
            self.row = {"step": asked.step, "loss": result.loss, "lr": asked.lr, "rate": self.progress.rate}
            self.row |= self.datamodule.read(asked.step) | self.datamodule.losses(asked.batch, result.groups)
            if not result.skipped:
                self.row["gradient_norm"] = result.norm
            if self.train.dtype == "float16":
                self.row |= {"loss_scale": result.scale, "skipped_steps": self.skipped}
            if asked.step % self.train.log_every == 0:
                self._log(**self.row)

    def _log_last(self) -> None:
        """Of the step that ends the run, where it was not its turn."""
        if self.row and self.row["step"] % self.train.log_every:
            self._log(**self.row)

    def _is_over(self, last: bool) -> bool:
        """Whether the validation ends the run before its last step."""
        self.why = None if last else stopping(self.train, self.done, self.best)
        if self.why:
            self.progress.say(f"step {self.done}: {self.why}; stopping")
        return self.why is not None

    def _evaluate(self) -> bool:
        """Whether the validation is the best so far."""
        reader = self.trainer.reader()
        if not self.writes:
            return False
        try:
            score = self.datamodule.validate(reader, self._evaluating)
        except Stopped:
            return False
        self.unjudged = False
        self._log(step=self.done, **score.rows)
        self.progress.say(f"step {self.done}  {score.said}")
        found = Best(self.done, score.loss, score.score)
        better = found.beats(self.best)
        if better:
            self.best = found
        return better

    def _evaluating(self, share: float) -> None:
        self.signals.check()
        self.progress.evaluating(share)

    def _save(self) -> None:
        trainer = self.trainer
        params, moments, carried, average = trainer.params(), trainer.optimizer_state(), trainer.carried(), trainer.average()
        if self.log is None:
            return
        told = gauges(self.config, params)
        if told:
            self._log(step=self.done, **told)
        self.log.sync()
        for name, array in {**params, **moments, **(carried or {})}.items():
            if not np.isfinite(array).all():
                raise Diverged(f"{name}: not finite after step {self.done}; {self._kept()}; lower optimizer.lr")
        train, threads = dataclasses.replace(self.train, backend=self.train.backend or default_backend()), self.trainer.threads
        saved = Checkpoint(
            self.done,
            train,
            self.config,
            params,
            moments,
            self.best,
            self.datamodule.tokenizer,
            threads,
            self.datamodule.digest,
            carried,
            average,
            self.unjudged,
        )
        self.last = checkpoints.save(self.folder, saved)
        checkpoints.prune(self.folder, self.train.keep, self.best, self.done)

    def _keep(self, asked: _Asked) -> Path:
        """Write the batch of a step that failed, to be looked at."""
        batch = asked.batch
        arrays = {"inputs": batch.inputs, "targets": batch.targets, "scored": batch.scored, "reset": batch.reset, "valid": batch.valid}
        path = self.folder / f"failed-step-{asked.step:08d}.safetensors"
        save_arrays(path, {name: a for name, a in arrays.items() if a is not None}, self.config, "batch")
        return path

    def _kept(self) -> str:
        return f"the last good checkpoint is {self.last}" if self.last else "no checkpoint had been saved yet"

    def _log(self, **values: float) -> None:
        if self.log is not None:
            self.log.add({"time": time.time(), **values})


def initial(train: TrainConfig, config: Config) -> Arrays:
    """Initial weights: drawn with the seed, or those of another checkpoint of the same model."""
    if train.init_from is None:
        return init_params(config, train.seed, train.param_dtype)
    if train.init_from in ELSEWHERE and not Path(train.init_from).exists():
        raise InputError(f"init_from: {train.init_from}; {ELSEWHERE[train.init_from]}")
    source = checkpoints.model_file(expanded(train.init_from))
    other, params = load_params(source)
    if other != config:
        changed = {name: value for name, value in config_to_dict(other).items() if config_to_dict(config).get(name) != value}
        raise InputError(f"init_from: {source} is of another model ({changed}); choose that model, or another checkpoint")
    return params
