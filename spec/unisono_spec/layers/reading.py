"""How a model reads: the form of every op in it with the marks of what is read, and what training draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unisono_spec.ops import position

Mask = np.ndarray | None


class Marks(NamedTuple):
    """reset: the sequence starts anew before this token. valid: where false, the token is not read. [B, T], or [B] of one token."""

    reset: Mask = None
    valid: Mask = None

    def at(self, t: int) -> Marks:
        """Of token t alone."""
        return Marks(*(None if m is None else m[:, t] for m in self))


class Training(NamedTuple):
    """What training draws, in the shapes that `Model.forward` names; nothing in evaluation."""

    dropout: Sequence[np.ndarray] | None = None
    noise: Sequence[np.ndarray] | None = None

    def at(self, t: int) -> Training:
        """For token t alone."""
        return Training(*(None if drawn is None else [a[:, t] for a in drawn] for drawn in self))

    def mask(self, update: int) -> Mask:
        """[B, D] or [B, T, D]: what residual update number `update` is multiplied by; None is 1."""
        return None if self.dropout is None else self.dropout[update]

    def router(self, layer: int) -> Mask:
        """[B, N] or [B, T, N]: what the router of `layer` adds to its logits; None in evaluation."""
        return None if self.noise is None else self.noise[layer]


class Reading:
    """One token [B] by each op's `step`, or, given a chunk_size, whole sequences [B, T] by its `parallel`.

    Forms of an op share no code; all that stands around the ops is this one reading's.
    """

    def __init__(self, marks: Marks, chunk_size: int | None = None) -> None:
        self.marks, self.chunk_size = marks, chunk_size

    @property
    def one_token(self) -> bool:
        return self.chunk_size is None

    def __call__(self, op: Any, *inputs: Any, more: tuple = ()) -> tuple[np.ndarray, Any]:
        """Outputs and the state after them; the last of `inputs` is the state before. more: what the op takes after the marks."""
        if self.one_token:
            return op.step(*inputs, *self.marks, *more)
        return op.parallel(*inputs, *self.marks, *more, self.chunk_size)

    def positions(self, before: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The position of each of `tokens`, and how many tokens the sequences then hold; `before` [B]: and held."""
        if self.one_token:
            return position.step(before, *self.marks)
        return position.parallel(before, tokens.shape[1], *self.marks)
