"""Minibatches for the training loop: a pure function of (seed, step), whatever the corpora and the mode."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from unisono_spec.contract import Arrays, Config, InputError, zero_state
from unisono_spec.contract.checks import check_ids
from unisono_spec.contract.initial import generator
from unisono_spec.contract.plain import MAX_INTEGER, expanded

from unisono_tools.backends.base import Batch
from unisono_tools.config import TrainConfig
from unisono_tools.data import Corpus, Mixture
from unisono_tools.data.batches import beginnings, drawn, in_epochs, reset_mask, rows_at, starts
from unisono_tools.data.mixture import streams
from unisono_tools.precompute import PrecomputedCorpus

FEWEST = 16  # numbers that an evaluation must predict
Loader = Callable[[int], Batch]


def loader(train: TrainConfig, config: Config, corpus: Corpus | Mixture) -> Loader:
    """step → what is learned from at that step."""
    mixture = Mixture.of(corpus)
    for one in mixture.corpora:
        check_corpus(config, one)
    if train.mode == "positions":
        return _positions(train, config, mixture.corpora[0])
    batches = _streamed if train.data.order == "streamed" else _drawn
    found = batches(train, config, mixture)
    found(0)  # a corpus that is too short is noticed before anything is written
    return found


def _drawn(train: TrainConfig, config: Config, mixture: Mixture) -> Loader:
    """Sequences that begin anew, each in a corpus drawn by its share."""
    size, length, seed = train.batch_size, train.seq_len, train.seed
    shuffled, truncated = train.data.order == "shuffled", train.data.documents == "truncated"
    documents = [_documents(corpus) if truncated else None for corpus in mixture.corpora]

    def sequences(step: int) -> Batch:
        which = mixture.drawn(seed, step * size, size)
        before = mixture.before(seed, step * size) if shuffled else np.zeros(len(mixture.corpora), np.int64)
        pieces, order = [], []
        for k in np.unique(which):
            ids, of = mixture.corpora[k].train, np.flatnonzero(which == k)
            numbers = before[k] + np.arange(len(of))
            places = starts(len(ids), seed, step, size, length, int(k))[of] if not truncated else None
            found = documents[k]
            if found is not None:
                first, sizes = found
                at_random = drawn(seed, step, int(k)).integers(0, len(first), size)[of]
                chosen = in_epochs(len(first), seed, numbers)[1] if shuffled else at_random
                pieces.append(beginnings(ids, first[chosen], sizes[chosen], length))
            else:
                if shuffled:
                    windows = (len(ids) - 1) // length
                    shift, place = in_epochs(windows, seed, numbers, len(ids) - 1 - windows * length)
                    places = place * length + shift
                assert places is not None
                resets = train.data.documents == "reset"
                marks = reset_mask(mixture.corpora[k].documents["train"], places, length) if resets else np.zeros((0, length), bool)
                pieces.append((rows_at(ids, places, length), marks))
            order.append(of)
        back = np.argsort(np.concatenate(order))
        rows, marks = np.concatenate([p[0] for p in pieces])[back], np.concatenate([p[1] for p in pieces])
        marks = marks[back] if len(marks) else None
        _check(config, rows)
        reset, valid = (None, marks) if truncated else (marks, None)
        state = starting_state(train, config, step)
        return Batch(rows[:, :-1], rows[:, 1:], valid, state, reset=reset, valid=valid, groups=_groups(which, mixture))

    return sequences


def _streamed(train: TrainConfig, config: Config, mixture: Mixture) -> Loader:
    """Each row of a batch goes on where it ended in the batch before. A corpus is cut into as many equal streams as its share of rows."""
    size, length, data = train.batch_size, train.seq_len, train.data
    lanes = mixture.lanes(size)
    windows = streams([len(c.train) for c in mixture.corpora], lanes, [c.name for c in mixture.corpora], length)

    def sequences(step: int) -> Batch:
        rows, marks = [], []
        for k, (corpus, number, each) in enumerate(zip(mixture.corpora, lanes.tolist(), windows, strict=True)):
            epoch, window = divmod(step, each)
            spare = len(corpus.train) - 1 - number * each * length
            shift = int(generator(train.seed, f"stream.{k}.{epoch}").integers(0, spare + 1))
            at = shift + (np.arange(number) * each + window) * length
            reset = reset_mask(corpus.documents["train"], at, length) if data.documents == "reset" else np.zeros((number, length), bool)
            reset[:, 0] |= window * length % (data.carry or each * length) == 0
            rows.append(rows_at(corpus.train, at, length))
            marks.append(reset)
        ids = np.concatenate(rows)
        _check(config, ids)
        which = np.repeat(np.arange(len(lanes)), lanes)
        return Batch(ids[:, :-1], ids[:, 1:], reset=np.concatenate(marks), carried=True, groups=_groups(which, mixture))

    return sequences


def _groups(which: np.ndarray, mixture: Mixture) -> np.ndarray | None:
    """Which rows are of which of several corpora, [B, corpora]."""
    return which[:, None] == np.arange(len(mixture.corpora)) if len(mixture.corpora) > 1 else None


def _documents(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Where the training documents that have a target start, and how many ids each has."""
    first = corpus.documents["train"]
    sizes = np.diff(first, append=len(corpus.train))
    if len(first) < 2 or not (sizes > 1).any():
        found = "one document" if len(first) < 2 else f"{len(first):,} documents of one id each"
        raise InputError(
            f"data.documents: truncated, and {corpus.name} is {found} to learn from; give a folder, a pattern, JSON lines "
            "or FASTA of longer ones, or use data.documents=joined"
        )
    return first[sizes > 1], sizes[sizes > 1]


def _check(config: Config, rows: np.ndarray) -> None:
    if not config.reads_frames:
        check_ids(rows, config.vocab_size)


def steps_of(train: TrainConfig, corpus: Corpus | Mixture) -> int:
    """The steps that `train.epochs` means for what is learned from, all corpora together; without it, its `steps`."""
    if not train.epochs:
        return train.steps
    rows = 0
    for one in Mixture.of(corpus).corpora:
        if train.data.documents == "truncated":
            rows += len(_documents(one)[0])
        else:
            rows += len(one.train) - 1 if train.mode == "positions" else (len(one.train) - 1) // train.seq_len
    steps = train.epochs * rows / train.batch_size
    if not steps < MAX_INTEGER:
        raise InputError(f"epochs: {train.epochs} of {rows:,} sequences are more steps than can be counted; use fewer")
    return max(1, math.ceil(steps))


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


def check_validation(corpus: Corpus, given: str | None) -> None:
    """Raise InputError where the validation split is so short that its loss would say nothing. given: the corpus that it is of, where
    that is another one."""
    ids = corpus.validation
    targets = max(0, len(ids) - 1) * (1 if ids.ndim == 1 else ids.shape[1])
    if targets < FEWEST:
        unit = "tokens" if ids.ndim == 1 else "frames"
        short = f"{len(ids)} {unit}, too few to evaluate on (at least {FEWEST + 1} tokens)"
        if given:
            raise InputError(f"data.validation: {given} has {short}; give a longer corpus, or leave it out")
        raise InputError(f"{corpus.name}: its validation split has {short}; give a longer corpus, or one to validate on in data.validation")


def starting_state(train: TrainConfig, config: Config, step: int) -> Arrays | None:
    """Where training may start anywhere, each sequence starts at a position drawn from (seed, step); else None, the initial state."""
    if config.starts == 1:
        return None
    state = zero_state(config, train.batch_size, dtype=train.dtype)
    state["position"] = generator(train.seed, f"position.{step}").integers(0, config.starts, train.batch_size, dtype=np.int32)
    return state


def _positions(train: TrainConfig, config: Config, corpus: Corpus) -> Loader:
    """Algorithm 1: positions of a precomputed ξ, in any order, without the tokens between them."""
    source = PrecomputedCorpus.open(expanded(str(train.data.precomputed)), config, corpus.train)

    def positions(step: int) -> Batch:
        xi, targets = source.batch(train.seed, step, train.batch_size)
        return Batch(xi, targets, precomputed=True)

    return positions
