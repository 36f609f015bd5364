"""taylor2's states as the kernels hold them: each pair of entries of x once.

[1, x / K^¼, vec(x xᵀ) / √(2K)] of 1 + K + K² features says x_a x_b twice. Here stand x_a x_(a+d), d ≤ K/2 and indices modulo K, d after d,
then x, then 1: F = (⌊K/2⌋ + 1) K + K + 1 of them, those of 0 < d < K/2 times √2, so that products of features are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count(width: int) -> int:
    """F of K."""
    return (width // 2 + 1) * width + width + 1


_orders: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}


def _order(width: int, device: torch.device) -> tuple[Tensor, ...]:
    """(left, right, twice) of each pair here: the entries, and whether it stands for both orders; (place, halved) of each pair there."""
    if torch.compiler.is_compiling():
        return _made(width, device)
    if (width, device) not in _orders:
        with torch.inference_mode(False):
            _orders[width, device] = _made(width, device)
    return _orders[width, device]


def _made(width: int, device: torch.device) -> tuple[Tensor, ...]:
    index = torch.arange((width // 2 + 1) * width, device=device)
    d, left = index // width, index % width
    twice = (d > 0) & (2 * d < width)
    index = torch.arange(width * width, device=device)
    a, b = index // width, index % width
    ahead = (b - a) % width
    place = torch.where(2 * ahead <= width, ahead * width + a, (a - b) % width * width + b)
    return left, (left + d) % width, twice, place, twice[place]


def of(x: Tensor) -> Tensor:
    """x [..., K] → its features here [..., F]."""
    width = x.shape[-1]
    left, right, twice, _, _ = _order(width, x.device)
    pair = x[..., left] * x[..., right] / width**0.5
    return torch.cat([torch.where(twice, pair, pair * 0.5**0.5), x / width**0.25, torch.ones_like(x[..., :1])], -1)


def held(state: Tensor, width: int, axis: int) -> Tensor:
    """A state of 1 + K + K² features along `axis` → of F."""
    left, right, twice, _, _ = _order(width, state.device)
    one, x, square = state.movedim(axis, -1).split((1, width, width * width), -1)
    there, back = (square[..., a * width + b] for a, b in ((left, right), (right, left)))
    pair = torch.where(twice, (there + back) * 0.5**0.5, there)
    return torch.cat([pair, x, one], -1).movedim(-1, axis)


def given(state: Tensor, width: int, axis: int) -> Tensor:
    """A state of F features → of 1 + K + K², the same of both orders of a pair."""
    _, _, _, place, halved = _order(width, state.device)
    pair, x, one = state.movedim(axis, -1).split(((width // 2 + 1) * width, width, 1), -1)
    square = pair[..., place]
    square = torch.where(halved, square * 0.5**0.5, square)
    return torch.cat([one, x, square], -1).movedim(-1, axis)
