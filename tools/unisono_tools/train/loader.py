"""Minibatches for the training loop: a pure function of (seed, step), whatever the corpus and the mode."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from unisono_spec.contract import Arrays, Config, InputError, zero_state
from unisono_spec.contract.checks import check_ids
from unisono_spec.contract.initial import generator

from unisono_tools.backends.base import Batch
from unisono_tools.config import TrainConfig
from unisono_tools.data import Corpus
from unisono_tools.data.batches import reset_mask, rows_at, shuffled_starts, starts
from unisono_tools.precompute import PrecomputedCorpus

FEWEST = 16  # numbers that an evaluation must predict
Loader = Callable[[int], Batch]


def loader(train: TrainConfig, config: Config, corpus: Corpus) -> Loader:
    """step → what is learned from at that step."""
    check_corpus(config, corpus)
    if train.mode == "positions":
        return _positions(train, config, corpus)

    draw_starts = shuffled_starts if train.data.order == "shuffled" else starts

    def sequences(step: int) -> Batch:
        at = draw_starts(len(corpus.train), train.seed, step, train.batch_size, train.seq_len)
        rows = rows_at(corpus.train, at, train.seq_len)  # [B, T+1]
        reset = reset_mask(corpus.documents["train"], at, train.seq_len) if train.data.documents == "reset" else None
        if not config.reads_frames:
            check_ids(rows, config.vocab_size)
        return Batch(rows[:, :-1], rows[:, 1:], state=starting_state(train, config, step), reset=reset)

    sequences(0)  # a corpus that is too short is noticed before anything is written
    return sequences


def steps_of(train: TrainConfig, corpus: Corpus) -> int:
    """The steps that `train.epochs` means for a corpus; without it, its `steps`."""
    if not train.epochs:
        return train.steps
    length = len(corpus.train) - 1
    rows = length if train.mode == "positions" else length // train.seq_len
    return max(1, math.ceil(train.epochs * rows / train.batch_size))


def check_corpus(config: Config, corpus: Corpus) -> None:
    """Raise InputError unless the model can read the corpus."""
    if config.reads_frames != (corpus.tokenizer is None):
        wants = "frames: give a .npy file [T, F]" if config.reads_frames else "text: give a text file or the name of a corpus"
        raise InputError(f"data.corpus: {corpus.name!r} does not fit a model that reads {wants}")
    if corpus.tokenizer is None:
        if corpus.train.shape[1] != config.frame_size:
            raise InputError(f"data.corpus: frames are {corpus.train.shape[1]} wide; set --model.overrides.frame_size to that")
    elif corpus.tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"data.tokenizer: {corpus.tokenizer.name!r} has {corpus.tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{config.vocab_size}; choose a preset with that vocabulary or set --model.overrides.vocab_size"
        )


def check_validation(corpus: Corpus) -> None:
    """Raise InputError where the validation split is so short that its loss would say nothing."""
    ids = corpus.validation
    targets = max(0, len(ids) - 1) * (1 if ids.ndim == 1 else ids.shape[1])
    if targets < FEWEST:
        unit = "tokens" if ids.ndim == 1 else "frames"
        raise InputError(
            f"{corpus.name}: its validation split has {len(ids)} {unit}, too few to evaluate on (at least {FEWEST + 1} tokens); give "
            "a longer corpus, or one to validate on in data.validation"
        )


def starting_state(train: TrainConfig, config: Config, step: int) -> Arrays | None:
    """Where training may start anywhere, each sequence starts at a position drawn from (seed, step); else None, the initial state."""
    if config.starts == 1:
        return None
    state = zero_state(config, train.batch_size, dtype=train.dtype)
    state["position"] = generator(train.seed, f"position.{step}").integers(0, config.starts, train.batch_size, dtype=np.int32)
    return state


def _positions(train: TrainConfig, config: Config, corpus: Corpus) -> Loader:
    """Algorithm 1: positions of a precomputed ξ, in any order, without the tokens between them."""
    source = PrecomputedCorpus.open(str(train.data.precomputed), config, corpus.train)

    def positions(step: int) -> Batch:
        xi, targets = source.batch(train.seed, step, train.batch_size)
        return Batch(xi, targets, precomputed=True)

    return positions
