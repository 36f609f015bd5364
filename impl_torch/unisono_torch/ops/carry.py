"""What fades between rows that decay at rates of their own: weights inside a chunk, and the states between chunks.

Only differences of log decays are ever raised to e, masked before. They are summed in float64, since a float32 sum that passed one
hard decay (log λ = −1000) would leave the soft ones after it no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unisono_torch.ops.dispatch import shorter
from unisono_torch.ops.recurrence import UPPER_CHUNK, chunks


def faded(log_decay: Tensor, cut: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log_decay [B, N, M, C] or [1, N, M, C], cut [B, N, C] (forgets before that row), or None →

    how much of row j row i still holds [..., M, C, C], and how much of the state before the chunk [..., M, C]. The last row of
    the first is what the state after the chunk holds.
    """
    total = log_decay.double().cumsum(-1)
    row = torch.arange(total.shape[-1], device=total.device)
    reads = row[:, None] >= row
    kept = total.to(dtype).exp()
    if cut is not None:
        segment = cut.cumsum(-1)[:, :, None]  # [B, N, 1, C]
        reads = reads & (segment[..., :, None] == segment[..., None, :])
        kept = torch.where(segment == 0, kept, 0)
    if dtype == torch.float64:
        # In the gradient of a difference, what rows hold of themselves cancels, and its roundings stay in the gradients of fast
        # decays. Narrower dtypes have a wider one for that; here each pair of rows sums the decays between them.
        between = log_decay[..., :, None].masked_fill(row[:, None] <= row, 0).cumsum(-2)
    else:
        between = total[..., :, None] - total[..., None, :]
    return between.masked_fill(~reads, -torch.inf).to(dtype).exp(), kept


def carried(own: Tensor, log_decay: Tensor, cut: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    """y_n = k_n λ_n y_{n−1} + own_n, where k_n is 0 if `cut` and else 1: the state before each row, and after the last.

    own [B, N, M, D], log_decay [B, N, M] or [1, N, M], cut [B, N], initial [B, M, D] → [B, N, M, D], [B, M, D].
    """
    after = _scan(own, log_decay, cut, initial, (UPPER_CHUNK,))
    return torch.cat([initial[:, None], after[:, :-1]], 1), after[:, -1].clone()


def _scan(own: Tensor, log_decay: Tensor, cut: Tensor | None, initial: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """In levels of matmuls over `sizes` rows each, the last of which is whole; as recurrence.py."""
    length = own.shape[1]
    size = shorter(sizes[0], length) if sizes else length
    own, log_decay = chunks(own, size).transpose(2, 3), chunks(log_decay, size).mT  # [B, P, M, C, D], [B, P, M, C]
    cut = None if cut is None else chunks(cut, size)
    decay, kept = faded(log_decay, cut, own.dtype)
    y = decay @ own
    if sizes:
        ends = y[..., -1, :]  # [B, P, M, D]
        after = _scan(ends, log_decay.double().sum(-1), None if cut is None else cut.any(-1), initial, sizes[1:])
        before = torch.cat([initial[:, None], after[:, :-1]], 1)
    else:
        before = initial[:, None]
    y = torch.addcmul(y, kept[..., None], before[..., None, :])
    return y.transpose(2, 3).flatten(1, 2)[:, :length]
