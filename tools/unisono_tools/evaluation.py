"""Held-out loss: a whole split streamed through a model, with the state handed from chunk to chunk, in constant memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from unisono_spec.contract import Config, InputError
from unisono_spec.contract.checks import check_ids

from unisono_tools.backends.base import Reader, caches
from unisono_tools.data.batches import reset_mask

CHUNK = 4096  # tokens read at once, fewer with a large vocabulary
LOGITS = 1 << 22  # numbers a chunk of logits may hold
FAR = 16  # times as many where they stay on the device that computes them
Progress = Callable[[float], None]  # of the share that is done, 0 to 1; called before each chunk


@dataclasses.dataclass(frozen=True)
class Score:
    """nats: summed over `targets` predictions (tokens, or pixels of frames)."""

    nats: float
    targets: int

    @property
    def loss(self) -> float:
        """Mean nats a target."""
        return self.nats / self.targets

    @property
    def bits(self) -> float:
        """Mean bits a target."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """Infinite where it exceeds what a float64 holds."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def default_window(config: Config, seq_len: int) -> int:
    """0, one unbroken stream, unless the model keeps every token that it reads (softmax attention) or has learned positions: then as
    many as it was trained on."""
    return seq_len if caches(config) or config.longest else 0


def evaluate(
    reader: Reader,
    ids: np.ndarray,
    limit: int = 0,
    window: int = 0,
    progress: Progress | None = None,
    documents: np.ndarray | None = None,
) -> Score:
    """Predict ids[1:] (frames [N, F] likewise) from what comes before each.

    limit: predict only so many tokens, 0 predicts all. window: start anew after so many tokens, 0 reads one unbroken stream. A model that
    keeps every token that it reads (softmax attention) holds as many as a window has. documents: sorted places where the state starts
    anew too, as in a Corpus; None carries it over them. Raises InputError where the loss is not finite.
    """
    config = reader.config
    for name, value in (("limit", limit), ("window", window)):
        if value < 0:
            raise InputError(f"{name}: {value}; use a positive number of tokens, or 0 for {'all' if name == 'limit' else 'no window'}")
    number = len(ids) - 1 if not limit else min(limit, len(ids) - 1)
    if number < 1:
        raise InputError(f"evaluation: {len(ids)} tokens predict nothing; give at least 2")
    width = 2 * ids.shape[1] if config.reads_frames else config.vocab_size
    # NumPy has one core for 65,536 × 50,257 exponentials in float64, each time: logits of a device are judged on it
    judge = getattr(reader, "nats", None) if config.predicts == "categorical" and getattr(reader, "far", False) else None
    chunk = max(1, min(CHUNK, (FAR if judge else 1) * LOGITS // width))
    state, nats, targets = reader.init_state(1, min(window or number, number)), 0.0, 0
    for start in range(0, number, chunk):
        if progress is not None:
            progress(start / number)
        stop = min(start + chunk, number)
        piece = np.asarray(ids[start : stop + 1])
        reset = None if not window else (np.arange(start, stop) % window == 0)[None]
        if documents is not None:
            starts = reset_mask(documents, np.array([start]), stop - start)
            reset = starts if reset is None else reset | starts
        if not config.reads_frames:
            check_ids(piece, config.vocab_size)
        if judge:
            found, state = judge(piece[None, :-1], piece[None, 1:], state, reset)
        else:
            logits, state = reader.forward(piece[None, :-1], state, reset)
            found = nll(config, logits[0], piece[1:])
        nats += float(found.sum())
        targets += piece[1:].size
        if not math.isfinite(nats):
            raise InputError(f"evaluation: the loss is {nats} within the first {stop} tokens; the weights are damaged or have diverged")
    return Score(nats, targets)


def part(progress: Progress | None, i: int, of: int) -> Progress | None:
    """What the i-th evaluation of `of` tells, for all of them to tell `progress`."""
    return None if progress is None else lambda share: progress((i + share) / of)


def nll(config: Config, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Nats of each target, in float64: logits [N, V] and ids [N], or the parameters [N, F or 2F] of frames [N, F] → [N] or [N, F]."""
    z = logits.astype(np.float64)
    kind = config.predicts
    if kind == "categorical":
        top = z.max(-1)
        log_sum = top + np.log(np.exp(z - top[:, None]).sum(-1))
        return log_sum - np.take_along_axis(z, targets[:, None].astype(np.int64), 1)[:, 0]
    y = targets.astype(np.float64)
    if kind == "bernoulli":
        return np.logaddexp(0, z) - y * z
    mean, log_variance = np.split(z, 2, -1)
    return 0.5 * (log_variance + (y - mean) ** 2 * np.exp(-log_variance) + math.log(2 * math.pi))
