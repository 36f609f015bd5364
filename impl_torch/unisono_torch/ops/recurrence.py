"""The parallel form that both sums share: y_t = λ^{n_t} k_t y_{t−1} + v_t in chunks, in three levels of matrix products.

n_t is 1 for a valid token and 0 otherwise; k_t is 0 at a reset and 1 otherwise. Inside a chunk of C tokens y is one masked product
with weights λ^{N_t−N_j}, where N counts valid tokens: integers, so no difference of two rounded sums and no power above 1. The
states between chunks obey the same recurrence over chunks, and so on up. Three levels, of which the last is whole, cost
O(T·C + (T / 64C)²) a channel: linear far past a million tokens, with no loop whose length depends on T (which torch.compile and
torch.export would unroll), and with rounding errors that grow as √C a level, not as T.

torch.export specialises a dimension that is 1 in its example; every level has two chunks or more when T > 2·64·C in the example.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unisono_torch.ops.dispatch import shorter
from unisono_torch.ops.fold import check_length

UPPER_CHUNK = 64  # chunks that one chunk of the second level holds


def chunked(
    v: Tensor,
    decay: float,
    initial_state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    chunk_size: int,
    exclusive: bool = False,
) -> Tensor:
    """y [B, T, D] from v [B, T, D], which is zero where not valid, and initial_state [B, D] of one dtype.

    exclusive: y_t without v_t; for decay 1 only.
    """
    count = None if valid is None or decay == 1 else valid.long()
    return _scan(v, decay, initial_state, count, 1, reset, (chunk_size, UPPER_CHUNK), exclusive)


def _scan(
    v: Tensor, decay: float, initial: Tensor, count: Tensor | None, span: int, cut: Tensor | None, sizes: tuple[int, ...], exclusive: bool
) -> Tensor:
    """Rows stand for `count` [B, T] valid tokens each (at most `span`; None: exactly), and `cut` [B, T] forgets before a row."""
    length = v.shape[1]
    if not sizes:
        weight, kept = _weights(decay, length, span, count, cut, exclusive, v)
        return weight @ v + kept * initial[:, None]
    size = shorter(sizes[0], length)
    v = chunks(v, size)  # [B, N, C, D]
    count = None if count is None else chunks(count, size)  # [B, N, C]
    cut = None if cut is None else chunks(cut, size)
    weight, kept = _weights(decay, size, span, count, cut, exclusive, v)  # [(B, N,) C, C], [(B, N,) C, 1]
    y = weight @ v
    ends = y[:, :, -1] + v[:, :, -1] if exclusive else y[:, :, -1]  # [B, N, D]
    count = None if count is None else count.sum(-1)
    cut = None if cut is None else cut.any(-1)
    after = _scan(ends, decay, initial, count, size * span, cut, sizes[1:], False)  # the state after each chunk
    before = torch.cat([initial[:, None], after[:, :-1]], 1)
    y = torch.addcmul(y, kept, before[:, :, None])
    return y.flatten(1, 2)[:, :length]


def _weights(
    decay: float, size: int, span: int, count: Tensor | None, cut: Tensor | None, exclusive: bool, v: Tensor
) -> tuple[Tensor, Tensor]:
    """How much of row j [..., C, C], and of the state before the chunk [..., C, 1], row i reads."""
    row = torch.arange(size, device=v.device)
    reads = row[:, None] > row if exclusive else row[:, None] >= row  # [C, C]
    untouched = row >= 0  # [..., C]: no reset so far in this chunk
    if cut is not None:
        segment = cut.int().cumsum(-1)
        reads = reads & (segment[..., :, None] == segment[..., None, :])
        untouched = segment == 0
    if decay == 1:
        return reads.to(v.dtype), untouched[..., None].to(v.dtype)
    # λ^n by table: made in float64, since a float32 λ near 1 would err by n·u; its last entry is for what is not read
    unread = size * span + 1
    powers = torch.pow(decay, torch.arange(unread, device=v.device, dtype=torch.float64))
    table = F.pad(powers, (0, 1)).to(v.dtype)
    n = (row + 1) * span if count is None else count.cumsum(-1)  # [..., C]
    between = torch.where(reads, n[..., :, None] - n[..., None, :], unread)  # [..., C, C]
    return table[between], table[torch.where(untouched, n, unread)][..., None]


def chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, ...] → [B, N, C, ...], padded by zeros."""
    check_length(x)
    batch, length = x.shape[:2]
    chunks = (length + size - 1) // size
    padding = chunks * size - length
    # a compiled or exported graph serves any length, so there the copy is always made
    if torch.compiler.is_compiling() or padding:
        x = torch.cat([x, x.new_zeros(batch, padding, *x.shape[2:])], 1)
    return x.reshape(batch, chunks, size, *x.shape[2:])
