"""What a run learns from and is judged by: batches, and the validation of a model as it stands."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
from unisono_spec.contract import Config

from unisono_tools.backends.base import Batch, Reader
from unisono_tools.config import DataChoice, TrainConfig
from unisono_tools.data import Corpus, Mixture, Tokenizer, characters_of, load_corpus
from unisono_tools.evaluation import Progress, default_window, evaluate, part
from unisono_tools.train.loader import check_validation, loader, steps_of

Rows = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Validation:
    """loss: mean nats a target. rows: for the log. said: for the reader. score: a task's own metric, of which more is better."""

    loss: float
    rows: Rows
    said: str
    score: float | None = None


class DataModule(Protocol):
    """What the loop asks of either kind. metric: the name of what `score` is; None where the loss decides."""

    name: str
    digest: str

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def metric(self) -> str | None: ...

    @property
    def steps(self) -> int:
        """How many steps the run has, which epochs may decide."""
        ...

    def batch(self, step: int) -> Batch: ...

    def read(self, step: int) -> Rows:
        """For the log: what the steps 0 … step − 1 have read."""
        ...

    def losses(self, batch: Batch, groups: tuple[float, ...]) -> Rows:
        """For the log: what a step's nats of the batch's groups say."""
        ...

    def validate(self, reader: Reader, progress: Progress | None = None) -> Validation: ...


class TextDataModule:
    """Corpora, each with its share of the sequences."""

    metric = None

    def __init__(self, train: TrainConfig, config: Config, corpus: Corpus | Mixture) -> None:
        self.train, self.config, self.mixture = train, config, Mixture.of(corpus)
        self.batches = loader(train, config, corpus)
        for one in self.mixture.corpora:
            check_validation(one, train.data.validation)
        self.name, self.digest, self.tokenizer = self.mixture.name, self.mixture.digest, self.mixture.tokenizer
        data = train.data
        # one that all share is evaluated once
        self.validated = self.mixture.corpora[: 1 if data.validation else None]
        self.window = data.eval_window if data.eval_window is not None else data.carry or default_window(config, train.seq_len)

    @property
    def steps(self) -> int:
        return steps_of(self.train, self.mixture)

    def batch(self, step: int) -> Batch:
        return self.batches(step)

    def read(self, step: int) -> Rows:
        """How many tokens of each of several corpora the steps 0 … step − 1 have read."""
        train, corpora = self.train, self.mixture.corpora
        if len(corpora) == 1:
            return {}
        streamed = train.data.order == "streamed"
        rows = self.mixture.lanes(train.batch_size) * step if streamed else self.mixture.before(train.seed, step * train.batch_size)
        return {f"tokens.{corpus.name}": float(n) for corpus, n in zip(corpora, rows * train.seq_len, strict=True)}

    def losses(self, batch: Batch, groups: tuple[float, ...]) -> Rows:
        """Mean nats a target of each of several corpora, of those that gave the step a sequence."""
        told = zip(self.mixture.corpora, groups, batch.group_counts.tolist(), strict=True) if groups else ()
        return {f"loss.{corpus.name}": nats / count for corpus, nats, count in told if count}

    def validate(self, reader: Reader, progress: Progress | None = None) -> Validation:
        """The loss on the validation split; of several, the mean weighted as the training sequences are, and each."""
        data = self.train.data
        losses = []
        for i, corpus in enumerate(self.validated):
            documents, told = None if data.documents == "joined" else corpus.documents["validation"], part(progress, i, len(self.validated))
            losses.append(evaluate(reader, corpus.validation, data.eval_tokens, self.window, progress=told, documents=documents).loss)
        weights = self.mixture.weights if len(losses) > 1 else np.ones(1)
        loss = float(weights @ losses)
        rows = {"validation_loss": loss, "validation_bits": loss / math.log(2)}
        each = {f"validation_loss.{corpus.name}": value for corpus, value in zip(self.validated, losses, strict=True)}
        said = f"validation {loss / math.log(2):.4f} bits a {'pixel' if self.config.reads_frames else 'token'}"
        if len(losses) == 1:
            return Validation(loss, rows, said)
        named = ", ".join(f"{corpus.name} {value / math.log(2):.4f}" for corpus, value in zip(self.validated, losses, strict=True))
        return Validation(loss, rows | each, f"{said} ({named})")


def load(data: DataChoice, tokenizer: Tokenizer | None = None) -> Mixture:
    """The corpus that `data` names, or its mixture, in the order of names. tokenizer: one that is loaded, instead of its own."""
    names = sorted(data.mixture)
    coder: str | Tokenizer = tokenizer or data.tokenizer
    if coder == "chars" and len(names) > 1:
        coder = characters_of([*names, *([data.validation] if data.validation else [])], data.limit, field=data.field)
    found = [load_corpus(name, coder, data.limit, field=data.field, validation=data.validation) for name in names or [data.corpus]]
    return Mixture(tuple(found), tuple(float(data.mixture[name]) for name in names) or (1.0,))
