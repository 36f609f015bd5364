"""unisono_spec.contract.sampling on a device: the same law and the same random numbers, without waiting for the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from unisono_spec.contract.sampling import NEAR_TIE

Chosen = tuple[Tensor, Tensor, Tensor]  # ids [B], near-ties [B], trouble [B]: 1 for a NaN, 2 for a row of −inf alone


def greedy(logits: Tensor) -> Chosen:
    """logits [B, V] → the best id of each row, the lowest of several."""
    z, trouble = _numbers(logits)
    half = z / 2  # so that no difference overflows
    best = half.amax(-1, keepdim=True)
    # an id even beside a NaN, where none is the best: it is read before the host looks
    ids = torch.where(half == best, torch.arange(z.shape[-1], device=z.device), z.shape[-1] - 1).amin(-1)
    second = half.scatter(1, ids[:, None], -torch.inf).amax(-1)
    least = torch.where(half > -torch.inf, half, torch.inf).amin(-1)
    return ids, best[:, 0] - second <= NEAR_TIE * (best[:, 0] - least), trouble


def drawn(logits: Tensor, u: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Chosen:
    """logits [B, V], u [B] in [0, 1), and float64 or integer scalars → ids by the inverse of the CDF, best first; top_k 0 keeps all."""
    # logits in their own dtype have the order of z / temperature, and fewer digits to sort by
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    z, trouble = _numbers(ordered)
    place = torch.arange(z.shape[-1], device=z.device)
    scaled = z / temperature
    scaled = torch.where(torch.isfinite(scaled[:, :1]), scaled, (z - z[:, :1]) / temperature)  # a temperature near 0
    p = (scaled - scaled[:, :1]).exp()
    p = p / p.sum(-1, keepdim=True)
    p = torch.where((place >= top_k) & (top_k > 0), 0, p)
    before, enough = p.cumsum(-1) - p, top_p * p.sum(-1, keepdim=True)
    cut = (place > 0) & (top_p < 1)  # the best stays
    few, p, many = (torch.where(cut & (before >= enough + by), 0, p) for by in (-NEAR_TIE, 0, NEAR_TIE))
    cdf = p.cumsum(-1)
    rank = torch.minimum((cdf <= u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True), (p != 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return order.gather(1, rank)[:, 0], _turns(z, rank, u[:, None], few, many), trouble


def _turns(z: Tensor, rank: Tensor, u: Tensor, few: Tensor, many: Tensor) -> Tensor:
    """Near-ties [B] of draws from sorted logits z [B, V]; few and many: what top_p keeps at least and at most, as the contract's."""
    edges, place = many.cumsum(-1), torch.arange(z.shape[-1], device=z.device)
    low, high = (u * kept.sum(-1, keepdim=True) for kept in (few, many))
    near = (edges >= low - NEAR_TIE) & (edges <= high + NEAR_TIE) & (place < (many != 0).sum(-1, keepdim=True) - 1)
    half = z / 2  # so that no difference overflows
    margin = NEAR_TIE * (half[:, :1] - torch.where(half > -torch.inf, half, torch.inf).amin(-1, keepdim=True))
    swaps = nn.functional.pad(half[:, :-1] - half[:, 1:] <= margin, (1, 1))  # of each with the one before it
    return near.any(-1) | swaps.gather(1, torch.cat([rank, rank + 1], 1)).any(-1)


def penalised(logits: Tensor, seen: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """logits and seen [B, V], a float64 scalar → logits after the penalty, float64, which are chosen from; trouble [B]."""
    z, trouble = _numbers(logits)
    moved = torch.where(z > 0, z / penalty, z * penalty)
    most = torch.finfo(torch.float64).max  # a penalty never forbids: what was finite stays so
    return torch.where(seen & torch.isfinite(z), moved.clamp(-most, most), z), trouble


def _numbers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """float64, where +inf, better than any number, is 0 among −inf; and what is wrong with each row."""
    z = logits.double()
    best = z.amax(-1, keepdim=True)
    trouble = torch.where(z.isnan().any(-1), 1, torch.where(best[:, 0] == -torch.inf, 2, 0))
    return torch.where(best == torch.inf, torch.where(z == torch.inf, 0.0, -torch.inf), z), trouble
