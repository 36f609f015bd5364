"""The training loop: from a TrainConfig to weights, by any backend that has gradients."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

from rich.console import Console
from unisono_spec.contract import Arrays, Config, InputError, config_to_dict, init_params
from unisono_spec.contract.files import load_params, write_bytes

from unisono_tools.backends import open_trainer
from unisono_tools.backends.base import Batch, Trainer
from unisono_tools.config import TrainConfig, check_continues, dump
from unisono_tools.data import Corpus, load_corpus
from unisono_tools.evaluation import evaluate
from unisono_tools.schedule import learning_rate
from unisono_tools.train import checkpoint as checkpoints
from unisono_tools.train.checkpoint import Best, Checkpoint
from unisono_tools.train.feed import Feed, feed
from unisono_tools.train.logs import Log
from unisono_tools.train.progress import Show


class Diverged(InputError):
    """The loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """checkpoint: the folder of the last one. best: the lowest validation loss, in nats a target. steps: how many were done."""

    run: Path
    checkpoint: Path
    best: Best | None
    steps: int


def train(train: TrainConfig, corpus: Corpus | None = None, console: Console | None = None, seconds: float = math.inf) -> Result:
    """Train as `train` says, or continue the run that is in its folder already.

    corpus: what `train.data.corpus` names, where the caller has loaded it. seconds: after so many, the run stops at its next step, with
    a checkpoint. Every random number is a function of (seed, step), so
    a continued run ends with the same weights as one that was never interrupted, bit for bit on equal software and thread count.
    """
    config, run = train.validate(), Path(train.out)
    last = checkpoints.latest(run)
    before = None if last is None else checkpoints.load(last)
    if before is not None:
        check_continues(train, before.train, str(last))
    corpus = load_corpus(train.data.corpus, train.data.tokenizer, train.data.limit) if corpus is None else corpus
    draw = feed(train, config, corpus)
    trainer = open_trainer(train, config)
    trainer.init(*(_initial(train, config), None) if before is None else (before.params, before.optimizer))
    checkpoints.sweep(run)
    if before is not None and last is not None and before.step >= train.steps:
        (console or Console(stderr=True)).print(f"{last} has all {train.steps} steps; raise --steps to train on")
        return Result(run, last, before.best, before.step)
    write_bytes(run / "config.yaml", dump(train).encode())
    return _Run(train, config, corpus, trainer, before, console, time.monotonic() + seconds).finish(draw)


class _Run:
    """A run in progress: what changes from step to step."""

    def __init__(
        self,
        train: TrainConfig,
        config: Config,
        corpus: Corpus,
        trainer: Trainer,
        before: Checkpoint | None,
        console: Console | None,
        deadline: float,
    ) -> None:
        self.deadline, self.ended = deadline, False
        self.train, self.config, self.corpus, self.trainer = train, config, corpus, trainer
        self.folder = Path(train.out)
        self.done, self.best = (0, None) if before is None else (before.step, before.best)
        self.last = checkpoints.latest(self.folder)
        self.show = Show(self.done, train.steps, "positions" if train.mode == "positions" else "tokens", console)
        self.log = Log(self.folder, self.done)
        for line in self.log.damaged:
            self.show.say(f"{self.log.path}: line {line} was damaged, and is left out")
        if before is not None:
            self.show.say(f"continuing {self.last}")
            if before.threads != trainer.threads:
                self.show.say(f"begun with {before.threads} threads, continued with {trainer.threads}: the last bits will differ")

    def finish(self, draw: Feed) -> Result:
        try:
            with self.show:
                while not self.ended:
                    self._step(draw(self.done))
        finally:
            self.log.close()
        assert self.last is not None
        return Result(self.folder, self.last, self.best, self.done)

    def _step(self, batch: Batch) -> None:
        train, opt = self.train, self.train.optimizer
        lr = learning_rate(self.done, train.steps, opt.lr, train.schedule)
        result = self.trainer.grad_step(batch, self.done, lr)
        self.done += 1
        for name, value in (("loss", result.loss), ("gradient's norm", result.norm)):
            if not math.isfinite(value):
                kept = f"the last good checkpoint is {self.last}" if self.last else "no checkpoint had been saved yet"
                raise Diverged(f"{name}: {value} at step {self.done}; {kept}; lower optimizer.lr or lengthen schedule.warmup_steps")
        self.show.step(self.done, result.loss, batch.targets.shape[0] * (1 if batch.precomputed else batch.targets.shape[1]))
        end = self.ended = self.done == train.steps or time.monotonic() > self.deadline
        if end or self.done % train.log_every == 0:
            self._log(loss=result.loss, lr=lr, gradient_norm=result.norm, rate=self.show.rate)
        better = (end or self.done % train.eval_every == 0) and self._evaluate()
        if end or better or self.done % train.checkpoint_every == 0:
            self._save()

    def _evaluate(self) -> bool:
        """Whether the validation loss is the lowest so far."""
        data = self.train.data
        score = evaluate(self.trainer.reader(), self.corpus.validation, data.eval_tokens, data.eval_window)
        self._log(validation_loss=score.loss, validation_bits=score.bits)
        unit = "pixel" if self.config.reads_frames else "token"
        self.show.say(f"step {self.done}  validation {score.bits:.4f} bits a {unit}")
        better = self.best is None or score.loss < self.best.loss
        if better:
            self.best = Best(self.done, score.loss)
        return better

    def _save(self) -> None:
        self.log.sync()
        tokenizer = None if self.corpus.tokenizer is None else self.corpus.tokenizer.name
        moments = self.trainer.optimizer_state()
        self.last = checkpoints.save(
            self.folder,
            Checkpoint(self.done, self.train, self.config, self.trainer.params(), moments, self.best, tokenizer, self.trainer.threads),
        )
        checkpoints.prune(self.folder, self.train.keep, self.best)

    def _log(self, **values: float) -> None:
        self.log.add({"step": self.done, "time": time.time(), **values})


def _initial(train: TrainConfig, config: Config) -> Arrays:
    """Initial weights: drawn with the seed, or those of another checkpoint of the same model."""
    if train.init_from is None:
        return init_params(config, train.seed, train.param_dtype)
    source = checkpoints.model_file(Path(train.init_from))
    other, params = load_params(source)
    if other != config:
        changed = {name: value for name, value in config_to_dict(other).items() if config_to_dict(config).get(name) != value}
        raise InputError(f"init_from: {source} is of another model ({changed}); choose that model, or another checkpoint")
    return params
