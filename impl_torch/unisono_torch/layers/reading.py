"""How a model reads: the form of every op in it with the marks of what is read, and what training draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unisono_torch.ops import mom_gru, position, rotary

Mask = Tensor | None
Rotation = rotary.Turn


class Marks(NamedTuple):
    """reset: the sequence starts anew before this token. valid: where false, the token is not read. [B, T], or [B] of one token."""

    reset: Mask = None
    valid: Mask = None

    def each(self, length: int) -> Iterator[Marks]:
        """Of one token after the other."""
        return map(Marks, *([None] * length if m is None else m.unbind(1) for m in self))


class Training(NamedTuple):
    """What training draws and measures, in the shapes that `Model.forward` names; nothing in evaluation."""

    dropout: Sequence[Tensor] | None = None
    noise: Sequence[Tensor] | None = None
    loads: list[Tensor] | None = None

    def each(self, length: int) -> Iterator[Training]:
        """For one token after the other; loads are of whole sequences."""
        # unbind, since the gradient of each a[:, t] would be as long as a
        return map(Training, *(zip(*(a.unbind(1) for a in drawn), strict=True) if drawn else [None] * length for drawn in self[:2]))

    def mask(self, update: int) -> Mask:
        """[B, D] or [B, T, D]: what residual update number `update` is multiplied by; None is 1."""
        return None if self.dropout is None else self.dropout[update]

    def masks(self, layer: int, updates: int = 2) -> tuple[Mask, ...]:
        """Those of one layer, where each has so many updates."""
        return tuple(self.mask(updates * layer + i) for i in range(updates))

    def router(self, layer: int) -> Mask:
        """[B, N] or [B, T, N]: what the router of `layer` adds to its logits; None in evaluation."""
        return None if self.noise is None else self.noise[layer]


class Reading:
    """One token [B] by each op's `step`, or, given a chunk_size, whole sequences [B, T] by its `parallel`."""

    def __init__(
        self,
        marks: Marks,
        chunk_size: int | None = None,
        implementation: str = "auto",
        fresh: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """fresh: whole sequences are read from the initial state, by what the caller gave and not by what it holds.

        dtype: what is computed in.
        """
        self.marks, self.chunk_size, self.implementation, self.fresh, self.dtype = marks, chunk_size, implementation, fresh, dtype

    @property
    def one_token(self) -> bool:
        return self.chunk_size is None

    def __call__(self, op: Any, *inputs: Any, **more: Any) -> tuple[Tensor, Any]:
        """Outputs and the state after them; the last of `inputs` is the state before. more: the op's own options."""
        if self.one_token:
            return op.step(*inputs, *self.marks, **more)
        whole = op.hoisted if op is mom_gru else op.parallel
        return whole(*inputs, *self.marks, chunk_size=self.chunk_size, implementation=self.implementation, **more)

    def positions(self, before: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The position of each of `tokens`, and how many tokens the sequences then hold; `before` [B]: and held."""
        return position.step(before, *self.marks) if self.one_token else position.parallel(before, tokens.shape[1], *self.marks)

    def rotation(self, where: Tensor, width: int, base: float, dtype: torch.dtype) -> Rotation:
        """RoPE of heads that are `width` wide, in `dtype`; where: the tokens' positions."""
        cos, sin = rotary.cos_sin(where, width, base, dtype)
        implementation = "plain" if self.one_token else self.implementation
        return Rotation(cos, sin, implementation)
