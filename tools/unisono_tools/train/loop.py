"""The training loop: from a TrainConfig to weights, by any backend that has gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from unisono_spec.contract import Arrays, Config, InputError, config_to_dict, init_params
from unisono_spec.contract.files import load_params, save_arrays, write_bytes

from unisono_tools.backends import open_trainer
from unisono_tools.backends.base import Batch, Trainer
from unisono_tools.config import TrainConfig, check_continues, default_backend, dump, processes, to_dict
from unisono_tools.data import Corpus, Mixture
from unisono_tools.schedule import learning_rate
from unisono_tools.signals import Signals, Stopped
from unisono_tools.train import checkpoint as checkpoints
from unisono_tools.train.checkpoint import Best, Checkpoint
from unisono_tools.train.feed import TextFeed
from unisono_tools.train.feed import load as load_data
from unisono_tools.train.guard import alone_in
from unisono_tools.train.logs import NAME as LOG
from unisono_tools.train.logs import Log
from unisono_tools.train.progress import ProgressBar


class Diverged(InputError):
    """The loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """checkpoint: the folder of the last one. best: the lowest validation loss, in nats a target. steps: how many were done.

    signal: the one that ended the run early.
    """

    run: Path
    checkpoint: Path
    best: Best | None
    steps: int
    signal: signal.Signals | None = None


def train(train: TrainConfig, corpus: Corpus | Mixture | None = None, console: Console | None = None, seconds: float = math.inf) -> Result:
    """Train as `train` says, or continue the run that is in its folder already.

    corpus: what `train.data.corpus` names, where the caller has loaded it. seconds: after so many, the run stops at its next step, with
    a checkpoint. SIGINT, SIGTERM and what else schedulers send end it likewise. Every random number is a function of (seed, step), so
    a continued run ends with the same weights as one that was never interrupted, bit for bit on equal software and thread count.
    """
    console = console or Console(stderr=True, quiet=processes()[0] > 0)
    config, run = train.validate(), train.folder
    feed = TextFeed(train, config, load(train) if corpus is None else corpus)
    train = dataclasses.replace(train, steps=feed.steps)
    for doubt in train.doubts():
        console.print(f"warning: {doubt}", highlight=False, markup=False, soft_wrap=True)
    seconds = min(seconds, 60 * train.max_minutes or math.inf)
    first = processes()[0] == 0
    # of several processes that torchrun starts, the first one holds the folder and writes
    with alone_in(run) if first else contextlib.nullcontext():
        found = checkpoints.newest(run)
        last, before, damaged = found or (None, None, [])
        if before is not None:
            check_continues(train, before.train, str(last))
            check_same_corpus(train, feed, before, str(last))
        trainer = open_trainer(train, config)
        if before is None:
            trainer.init(_initial(train, config))
        else:
            trainer.init(before.params, before.optimizer, before.carried)
        if first:
            checkpoints.sweep(run)
        for complaint in damaged:
            console.print(f"warning: {complaint}; going back to {last}", highlight=False, markup=False, soft_wrap=True)
        if before is not None and last is not None and before.step >= train.steps:
            console.print(f"{last} has all {train.steps} steps; raise --steps to train on")
            return Result(run, last, before.best, before.step)
        if first:
            write_bytes(run / "config.yaml", dump(train).encode())
        with Signals() as signals:
            return _Run(train, config, feed, trainer, before, last, console, time.monotonic() + seconds, signals).finish()


def load(train: TrainConfig) -> Mixture:
    """What a run learns from."""
    return load_data(train.data)


def check_same_corpus(train: TrainConfig, feed: TextFeed, before: Checkpoint, source: str) -> None:
    """Raise InputError where the corpus is not the one that the run began with."""
    if before.corpus and feed.digest and before.corpus != feed.digest:
        raise InputError(
            f"data.corpus: {Path(train.data.corpus).absolute() if Path(feed.name).exists() else feed.name} now holds "
            f"{feed.digest[:12]}, {source} learned from {before.corpus[:12]}: the text, its splits or the tokenizer changed; "
            "restore it, or choose another --out (with --init_from to start from its weights)"
        )


class _Run:
    """A run in progress: what changes from step to step."""

    def __init__(
        self,
        train: TrainConfig,
        config: Config,
        feed: TextFeed,
        trainer: Trainer,
        before: Checkpoint | None,
        last: Path | None,
        console: Console,
        deadline: float,
        signals: Signals,
    ) -> None:
        self.deadline, self.ended, self.signals = deadline, False, signals
        self.train, self.config, self.feed, self.trainer = train, config, feed, trainer
        self.folder, self.last = train.folder, last
        self.done, self.best = (0, None) if before is None else (before.step, before.best)
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
                while not self.ended:
                    self._step(self.feed.batch(self.done))
        finally:
            if self.log is not None:
                self.log.close()
        self.trainer.any(False)  # all wait for what the first one writes
        self.last = self.last or checkpoints.latest(self.folder)
        assert self.last is not None
        if self.signals.received is not None and self.done < self.train.steps:
            self.progress.say(
                f"{self.signals.received.name}: stopped at step {self.done}, which is saved; "
                f"`unisono train --resume {shlex.quote(str(self.folder))}` continues"
            )
            return Result(self.folder, self.last, self.best, self.done, self.signals.received)
        return Result(self.folder, self.last, self.best, self.done)

    def _step(self, batch: Batch) -> None:
        train, opt = self.train, self.train.optimizer
        lr = learning_rate(self.done, train.steps, opt.lr, train.schedule)
        result = self.trainer.grad_step(batch, self.done, lr)
        self.done += 1
        for name, value in (("loss", result.loss), ("gradient's norm", result.norm)):
            if not math.isfinite(value):
                kept = f"{self._kept()}; its batch is {self._keep(batch)}"
                raise Diverged(f"{name}: {value} at step {self.done}; {kept}; lower optimizer.lr or lengthen schedule.warmup_steps")
        self.progress.step(self.done, result.loss, batch.targets.shape[0] * (1 if batch.precomputed else batch.targets.shape[1]))
        end = self.done == train.steps or time.monotonic() > self.deadline
        self.ended = end or self.signals.received is not None
        if end or self.done % train.log_every == 0:
            self._log(loss=result.loss, lr=lr, gradient_norm=result.norm, rate=self.progress.rate, **self.feed.read(self.done))
        better = (end or self.done % train.eval_every == 0) and self._evaluate()
        if train.patience and self.best is not None and self.done - self.best.step >= train.patience * train.eval_every and not end:
            self.progress.say(f"step {self.done}: no lower validation loss since step {self.best.step}; stopping")
            self.ended = True
        if batch.carried:
            better = self.trainer.any(better)  # all must save, for each has a part of what is carried
        # a signal may also have come while evaluating
        self.ended = self.trainer.any(self.ended or self.signals.received is not None)
        if self.ended or better or self.done % train.checkpoint_every == 0:
            self._save()

    def _evaluate(self) -> bool:
        """Whether the validation loss is the lowest so far."""
        if self.signals.received is not None or not self.writes:
            return False
        try:
            score = self.feed.validate(self.trainer.reader(), self.signals.check)
        except Stopped:
            return False
        self._log(**score.rows)
        self.progress.say(f"step {self.done}  {score.said}")
        better = self.best is None or score.loss < self.best.loss
        if better:
            self.best = Best(self.done, score.loss)
        return better

    def _save(self) -> None:
        carried = self.trainer.carried()
        if self.log is None:
            return
        self.log.sync()
        params, moments = self.trainer.params(), self.trainer.optimizer_state()
        for name, array in {**params, **moments, **(carried or {})}.items():
            if not np.isfinite(array).all():
                raise Diverged(f"{name}: not finite after step {self.done}; {self._kept()}; lower optimizer.lr")
        train, threads = dataclasses.replace(self.train, backend=self.train.backend or default_backend()), self.trainer.threads
        saved = Checkpoint(
            self.done, train, self.config, params, moments, self.best, self.feed.tokenizer, threads, self.feed.digest, carried
        )
        self.last = checkpoints.save(self.folder, saved)
        checkpoints.prune(self.folder, self.train.keep, self.best)

    def _keep(self, batch: Batch) -> Path:
        """Write the batch of a step that failed, to be looked at."""
        arrays = {"inputs": batch.inputs, "targets": batch.targets, "scored": batch.scored, "reset": batch.reset, "valid": batch.valid}
        path = self.folder / f"failed-step-{self.done:08d}.safetensors"
        save_arrays(path, {name: a for name, a in arrays.items() if a is not None}, self.config, "batch")
        return path

    def _kept(self) -> str:
        return f"the last good checkpoint is {self.last}" if self.last else "no checkpoint had been saved yet"

    def _log(self, **values: float) -> None:
        if self.log is not None:
            self.log.add({"step": self.done, "time": time.time(), **values})


def _initial(train: TrainConfig, config: Config) -> Arrays:
    """Initial weights: drawn with the seed, or those of another checkpoint of the same model."""
    if train.init_from is None:
        return init_params(config, train.seed, train.param_dtype)
    source = checkpoints.model_file(Path(train.init_from).expanduser())
    other, params = load_params(source)
    if other != config:
        changed = {name: value for name, value in config_to_dict(other).items() if config_to_dict(config).get(name) != value}
        raise InputError(f"init_from: {source} is of another model ({changed}); choose that model, or another checkpoint")
    return params
