"""Some rows or heads at a time, where the states of all at once would take more memory than inputs and outputs allow.

Each part is a call of its own, of views; what comes out is copied into the whole, and what rows or heads share is added up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unisono_torch.kernels import rows
from unisono_torch.kernels.multiscale import table


class Part(rows.Part):
    def inputs(self, q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid) -> tuple[Any, ...]:
        """Its views of an operator's inputs."""
        moved = (self.moved(a) for a in (q, k, v, q_norm, k_norm))
        return *moved, self.of(log_decay), self.of(weight, 0, 3), self.of(S, 0, 2), self.of(z, 0, 2), self.of(reset), self.of(valid)

    def turn(self, whole: Any) -> Any:
        """Its view of a Turn."""
        places = {name: self.of(getattr(whole, name), 0, 2) for name in ("dq", "dk", "dv")}
        return whole._replace(cos=self.of(whole.cos), sin=self.of(whole.sin), **places)


def count(K: int, V: int, scales: int, dtype: torch.dtype, fades: bool) -> float:
    """A part is to be at most one in so many, by widths. fades: whether decays have gradients."""
    half = dtype == torch.bfloat16
    size, made, span = dtype.itemsize, 2 if half else 4, 128 if half else 64
    blocks = -(-max(K, V) // 64)
    # gradients of decays are one array a token of Triton's kernels; hopper_segments.py adds them up
    arrays = 5 + (1 + blocks) * (fades and not (half and K == V == 64))
    whole = 4 * size * (K + V)  # bytes a token and head, of inputs and outputs of both ways
    states = 2 * scales * (made * K * V + 4 * K) / span
    held, at_once = 4 * scales / whole, (states + 4 * scales * arrays) / whole
    if held + at_once <= table.WHOLE:
        return 1
    # a part's own outputs are there beside the whole's, and copies of inputs where 16 bytes do not begin at every head
    copied = 3 / 8 + (K % 8 > 0 or V % 8 > 0) / 2
    return min(table.PARTS, (at_once + copied) / max(0.1, table.EACH - held))


def division(q: Tensor, v: Tensor, scales: int, fades: bool) -> list[Part]:
    """From the shape and dtype alone, so that a result's bits do not depend on the GPU."""
    (batch, length, heads, K), V = q.shape, v.shape[-1]
    wanted = 1 if batch * length * heads * (K + V) < table.LARGE else count(K, V, scales, q.dtype, fades)
    return [Part(*part) for part in rows.division(batch, heads, wanted)]


def joined(
    whole: tuple[Tensor, ...], read: Callable[..., tuple[Tensor, ...]], divided: list[Part], given: tuple[Any, ...], still: bool
) -> Any:
    """What `read` makes of each part, in `whole`: o, S, z, denominators."""
    for part in divided:
        for a, piece, heads in zip(whole, read(*part.inputs(*given), still), (2, 2, 2, 1), strict=True):
            part.of(a, 0, heads).copy_(piece)
    return whole


def gradients_joined(
    whole: list[Tensor], made: Callable[..., tuple[Tensor, ...]], divided: list[Part], before: tuple[Tensor, ...], given: tuple[Any, ...],
    asked: tuple[bool, bool], turn: Any, still: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `made` makes of each part, in `whole`, as operator.gradients gives it; of a turn in its own places, where kernels do that."""
    do, dS, dz, denominator = before
    for shared in whole[5:7]:
        shared.zero_()
    if turn is not None:
        whole[:3] = turn.dq, turn.dk, turn.dv
    for part in divided:
        mine = None if turn is None else part.turn(turn)
        places = part.moved(do), part.of(dS, 0, 2), part.of(dz, 0, 2), part.of(denominator, 0, 1)
        found = made(*places, *part.inputs(*given), *asked, mine, still)
        if mine is not None and found[0] is not mine.dq and turn is not None and whole[0] is turn.dq:
            whole[:3] = (a.new_empty(a.shape) for a in given[:3])
        for i, (a, piece) in enumerate(zip(whole, found, strict=True)):
            if not a.numel() or (mine is not None and i < 3 and piece is mine[3 + i]):
                continue
            if i in (5, 6):  # of decays, and of weights
                part.of(a, 0, None if i == 5 else 3).add_(piece)
            else:
                part.of(a, 0, 2).copy_(piece)
        del mine, places, found  # before the next part's are made
    return tuple(whole)
