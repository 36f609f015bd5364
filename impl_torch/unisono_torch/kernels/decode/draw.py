"""An id of each row by the inverse of its CDF, best first, and whether it was a near-tie, as unisono_spec.contract.sampling has it; written
where the loop reads.

Of sorted logits, in two launches: sums of probabilities along each block of a row, then what the contract asks of them. What top_k and
top_p keep is the beginning of a row, so all that is asked is how many sums lie below something.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from unisono_spec.contract.sampling import NEAR_TIE

from unisono_torch.kernels.decode.common import launch, ready

BLOCK = 1024
NEAR = tl.constexpr(NEAR_TIE)


@triton.jit
def _number(p, best, mask):
    """Logits at p in float64, where +inf, better than any number, is 0 among −inf."""
    z = tl.load(p, mask=mask, other=-float("inf")).to(tl.float64)
    return tl.where(best == float("inf"), tl.where(z == float("inf"), 0.0, -float("inf")), z)


@triton.jit
def sums(ordered, temperature, along, part, V, COUNT, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """along [B, V]: the sum of e^((z − best)/temperature) from a block's beginning to each place. part [B, 3, COUNT]: a block's sum, how
    many of it are not 0, and its least finite z."""
    row = tl.program_id(1)
    block = tl.program_id(0)
    ready(EARLY)
    i = block * BLOCK + tl.arange(0, BLOCK)
    own = ordered + row.to(tl.int64) * V
    first = tl.load(own).to(tl.float64)
    z = _number(own + i, first, i < V)
    best = tl.where(first == float("inf"), 0.0, first)
    t = tl.load(temperature)
    far = tl.abs(best / t) < float("inf")
    scaled = tl.where(far, z / t - best / t, (z - best) / t)  # a temperature near 0
    p = tl.where(i < V, tl.exp(scaled), 0.0)
    tl.store(along + row.to(tl.int64) * V + i, tl.cumsum(p, 0), mask=i < V)
    to = part + row * 3 * COUNT + block
    tl.store(to, tl.sum(p, 0))
    tl.store(to + COUNT, tl.sum((p != 0).to(tl.float64), 0))
    tl.store(to + 2 * COUNT, tl.min(tl.where(tl.abs(z) < float("inf"), z, float("inf")), 0))


@triton.jit
def _below(along, ends, starts, b, t, equal, V, BLOCK: tl.constexpr):
    """For each t [4], how many sums along the row are less, or equal where it says so."""
    e = ends[None, :]
    whole = tl.sum(((e < t[:, None]) | (equal[:, None] & (e == t[:, None]))).to(tl.int32), 1)
    start = tl.sum(tl.where(b[None, :] == whole[:, None], starts[None, :], 0.0), 1)
    i = whole[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    e = start[:, None] + tl.load(along + i, mask=i < V, other=float("inf"))
    inside = tl.sum(((e < t[:, None]) | (equal[:, None] & (e == t[:, None]))).to(tl.int32), 1)
    return tl.minimum(whole * BLOCK + inside, V)


@triton.jit
def _sum(along, starts, b, i, BLOCK: tl.constexpr):
    """The sums up to places i [4]."""
    return tl.sum(tl.where(b[None, :] == (i // BLOCK)[:, None], starts[None, :], 0.0), 1) + tl.load(along + i)


@triton.jit
def chosen(
    ordered, order, along, part, uniform, top_k, top_p, number, ids, ties, trouble, token, V, B, COUNT, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Row `number` of ids, ties and trouble [·, B], and token [B], drawn with uniform [·, B]. trouble: 1 for a NaN, 2 for −inf alone."""
    row = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    on = b < COUNT
    ready(EARLY)
    ordered += row.to(tl.int64) * V
    order += row.to(tl.int64) * V
    along += row.to(tl.int64) * V
    part += row * 3 * COUNT
    out = tl.load(number) * B + row
    u = tl.load(uniform + out)
    each = tl.load(part + b, mask=on, other=0.0)
    some = tl.sum(tl.load(part + COUNT + b, mask=on, other=0.0), 0).to(tl.int32)
    least = tl.min(tl.load(part + 2 * COUNT + b, mask=on, other=float("inf")), 0)
    starts = tl.cumsum(each, 0) - each
    ends = tl.where(on, starts + each, float("inf"))
    near = tl.sum(each, 0) * NEAR
    k = tl.load(top_k)
    kept = tl.where((k > 0) & (k < V), k, V).to(tl.int32)
    lane = tl.arange(0, 4)
    share = tl.load(top_p)
    enough = share * _sum(along, starts, b, kept - 1 + 0 * lane, BLOCK)
    # what top_p keeps at least, as it is, and at most; the best stays
    cut = tl.minimum(1 + _below(along, ends, starts, b, enough + (lane - 1) * near, lane < 0, V, BLOCK), kept)
    cut = tl.where(share < 1, cut, kept)
    drawn = u * _sum(along, starts, b, cut - 1, BLOCK)
    low = tl.sum(tl.where(lane == 0, drawn, 0.0), 0) - near
    here = tl.sum(tl.where(lane == 1, drawn, 0.0), 0)
    high = tl.sum(tl.where(lane == 2, drawn, 0.0), 0) + near
    found = _below(along, ends, starts, b, tl.where(lane == 0, low, here), lane == 1, V, BLOCK)
    last = tl.minimum(cut, some) - 1
    edge = tl.sum(tl.where(lane == 0, found, 0), 0)
    tie = (edge < tl.sum(tl.where(lane == 2, last, 0), 0)) & (
        tl.sum(tl.where(lane == 0, _sum(along, starts, b, tl.minimum(found, V - 1), BLOCK), 0.0), 0) <= high
    )
    rank = tl.maximum(tl.sum(tl.where(lane == 1, tl.minimum(found, last), 0), 0), 0)
    first = tl.load(ordered).to(tl.float64)
    best = tl.where(first == float("inf"), 0.0, first)
    margin = (best / 2 - least / 2) * NEAR  # halves, so that no difference overflows
    here = _number(ordered + rank, first, True) / 2
    before = _number(ordered + tl.maximum(rank - 1, 0), first, True) / 2
    after = _number(ordered + tl.minimum(rank + 1, V - 1), first, True) / 2
    tie = tie | ((rank > 0) & (before - here <= margin)) | ((rank + 1 < V) & (here - after <= margin))
    id = tl.load(order + rank)
    tl.store(ids + out, id)
    tl.store(ties + out, tie)
    tl.store(trouble + out, tl.where(first != first, 1, tl.where(first == -float("inf"), 2, 0)))
    tl.store(token + row, id)


def draw(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, number: Tensor, ids: Tensor, ties: Tensor,
    trouble: Tensor, token: Tensor,
) -> None:  # fmt: skip
    """logits [B, V], uniform [·, B] in [0, 1), and scalars, of float64 but for top_k → ids, ties and trouble [·, B] at row `number` [], and
    token [B]."""
    # logits in their own dtype have the order of z / temperature, and fewer digits to sort by; a NaN comes first
    ordered, order = (a.contiguous() for a in logits.sort(dim=-1, descending=True, stable=True))
    batch, vocabulary = logits.shape
    count = triton.cdiv(vocabulary, BLOCK)
    along, part = uniform.new_empty((batch, vocabulary)), uniform.new_empty((batch, 3, count))
    sums[(count, batch)](ordered, temperature, along, part, vocabulary, count, BLOCK=BLOCK, num_warps=4, **launch(logits.device))
    chosen[(batch,)](
        ordered, order, along, part, uniform, top_k, top_p, number, ids, ties, trouble, token, vocabulary, batch, count,
        BLOCKS=triton.next_power_of_2(count), BLOCK=BLOCK, num_warps=4, **launch(logits.device),
    )  # fmt: skip
