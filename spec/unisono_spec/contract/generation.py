"""Continuing prompts, once for every room: the prompt in pieces, one token after the other, and where to go on from."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unisono_spec.contract.base import ANY, Config
from unisono_spec.contract.checks import check_ids, check_inputs
from unisono_spec.contract.errors import InputError, shown
from unisono_spec.contract.files import check_positions
from unisono_spec.contract.memory import check_fits
from unisono_spec.contract.ordinary import check_ordinary
from unisono_spec.contract.sampling import Sampling, choose

PIECE = 512  # tokens of a prompt read at once: what a long prompt needs in memory is what so many need
MOST = 2**32  # ids that one (seed, row) has random numbers for


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` found, and where it stopped.

    tokens: `[B, n]` int64. near_ties: `[B, n]` bool: choices that another backend's rounding could turn. state: after the prompt
    and every generated id but the last, which no call has read yet. n_generated: ids generated over all calls. So
    `generate(found.tokens[:, -1:], n, sampling, found.state, found.n_generated)` goes on as one longer call would have; under a repetition
    penalty with `seen=found.seen` too, `[B, V]` bool: the ids that each text holds. Without a penalty it is None.
    """

    tokens: np.ndarray
    near_ties: np.ndarray
    state: Any = None
    n_generated: int = 0
    seen: np.ndarray | None = None


def generate(
    config: Config,
    begin: Callable[[Any, int, int], Any],
    last: Callable[[np.ndarray, Any, np.ndarray | None], tuple[np.ndarray, Any]],
    prompt: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling,
    state: Any = None,
    n_generated: int = 0,
    valid: np.ndarray | None = None,
    seen: np.ndarray | None = None,
    follow: Callable[..., tuple[np.ndarray, np.ndarray, Any] | None] | None = None,
) -> Generated:
    """Continue prompt [B, T] by `max_new_tokens` ids, where `valid` [B, T] says which tokens of a ragged prompt count.

    begin(state or None, B, n): a state with room for n more tokens. last(tokens [B, T], state, valid): the logits [B, V] of each
    row's last valid token, and the state after all; where a row has none, its logits are not looked at.
    seen [B, V]: ids that the texts hold before the prompt, for a repetition penalty.
    follow(ids [B], state, sampling, number, n, seen), ids int64: the n ids and near-ties [B, n] that come after ids by the same law,
    `number` ids after the first, and the state after all but the last; None where it does not want to. seen: as here, where there is a
    penalty, with ids; else None.
    """
    if config.reads_frames:
        raise InputError("generate: a frame model predicts distributions of frames, not ids; call step and draw the next frame")
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling: {type(sampling).__name__}; give a Sampling, such as Sampling(temperature=0.8, seed=1)")
    number, count = _count("n_generated", n_generated), _count("max_new_tokens", max_new_tokens)
    if number + count > MOST:
        raise InputError(f"n_generated: {number} and {count} new ones are more than 2**32; use another seed, and n_generated=0")
    check_inputs(config, prompt, state, None, valid)
    check_ids(prompt, config.vocab_size)  # pyright: ignore[reportAttributeAccessIssue]
    if state is not None and "position" in state:  # who follows asks no more
        check_positions({"position": np.array(state["position"].tolist(), np.int64)}, 1)
    if valid is not None and not valid.any(1).all():
        raise InputError(f"valid: row {int(valid.any(1).argmin())} has no token that counts; give each row one at least")
    check_fits(9 * len(prompt) * count, f"max_new_tokens: {count}", "generate fewer at once, and go on from what is returned")
    marks = _seen(config, prompt, valid, seen) if sampling.repetition_penalty != 1 else None
    state = begin(state, len(prompt), prompt.shape[1] + count)
    if prompt.shape[1] == 1 and count and follow is not None:
        first = prompt[:, 0].astype(np.int64)  # a copy: a caller's may be read-only, or lie backwards
        if found := follow(first, state, sampling, number, count, marks):
            return _found(*found, number, marks)
    logits, state = _prompted(last, prompt, state, valid)
    ids, ties = np.empty((len(prompt), count), np.int64), np.empty((len(prompt), count), bool)
    for n in range(count):
        if n:
            logits, state = last(ids[:, n - 1 : n], state, None)
        ids[:, n], ties[:, n] = choose(logits, sampling, number + n, marks)
        if marks is not None:
            np.put_along_axis(marks, ids[:, n, None], True, 1)
        if n == 0 and count > 1 and follow is not None and (found := follow(ids[:, 0], state, sampling, number + 1, count - 1, marks)):
            ids[:, 1:], ties[:, 1:], state = found
            break
    return _found(ids, ties, state, number, marks)


def _found(ids: np.ndarray, ties: np.ndarray, state: Any, number: int, marks: np.ndarray | None) -> Generated:
    if marks is not None:
        np.put_along_axis(marks, ids, True, 1)
    return Generated(ids, ties, state, number + ids.shape[1], marks)


def _seen(config: Config, prompt: np.ndarray, valid: np.ndarray | None, before: np.ndarray | None) -> np.ndarray:
    """`before`, and the ids of each row's prompt that count, [B, V]."""
    shape = (len(prompt), config.vocab_size)
    check_ordinary("seen", before)
    if before is not None and (not isinstance(before, np.ndarray) or before.shape != shape or before.dtype != bool):
        raise InputError(f"seen: {shown(before)}; give what an earlier call returned, booleans {shape}")
    check_fits(shape[0] * shape[1], f"seen: {shape[0]} rows of {shape[1]} ids", "continue fewer prompts at once")
    marks = np.zeros(shape, bool) if before is None else before.copy()
    rows = np.broadcast_to(np.arange(len(prompt))[:, None], prompt.shape)
    counted = slice(None) if valid is None else valid
    marks[rows[counted], prompt[counted]] = True
    return marks


def _prompted(
    last: Callable[..., tuple[np.ndarray, Any]], prompt: np.ndarray, state: Any, valid: np.ndarray | None
) -> tuple[np.ndarray, Any]:
    found: np.ndarray | None = None
    for start in range(0, prompt.shape[1], PIECE):
        piece = slice(start, start + PIECE)
        mask = None if valid is None else valid[:, piece]
        if mask is not None and len(mask) and not mask.any():
            continue  # padding of every row
        logits, state = last(prompt[:, piece], state, mask)
        found = logits if mask is None or found is None else np.where(mask.any(1, keepdims=True), logits, found)
    assert found is not None
    return found, state


def roomy(config: Config, state: Mapping[str, Any], more: int, pad: Callable[[Any, int, int], Any]) -> dict[str, Any]:
    """`state` with caches that hold `more` tokens yet; a power of two where they must grow, so that they grow seldom.

    pad(array, axis, n): the array with n zeros behind it along that axis.
    """
    caches = {name: 1 + s.shape.index(ANY) for name, s in config.states().items() if ANY in s.shape}
    if not caches:
        return dict(state)
    needed = max(state["position"].tolist(), default=0) + more
    short = {name for name, axis in caches.items() if state[name].shape[axis] < needed}
    size = 1 << (needed - 1).bit_length()
    return {name: pad(a, caches[name], size - a.shape[caches[name]]) if name in short else a for name, a in state.items()}


def _count(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool | np.bool_) or value < 0:
        raise InputError(f"{name}: {shown(value)}; give an integer of 0 or more")
    return int(value)
