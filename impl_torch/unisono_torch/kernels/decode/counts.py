"""As draw.py, of logits of 16 bits, without a sort: how many ids have each of the 65,536 numbers, best first, and sums over those.

Four launches: counts; sums of probabilities along blocks of numbers; what the contract asks of them; the id. Equals stand side by side by
their ids, so that a place in the row is a number and how many of its ids come before.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from unisono_spec.contract.sampling import NEAR_TIE

from unisono_torch.kernels.decode.common import launch, loaded, ready

NUMBERS = tl.constexpr(65536)
BLOCK = tl.constexpr(256)
BLOCKS = tl.constexpr(256)
SOME = 1024  # logits that a program counts
ROWS = range(4, 65)  # of which sorts take longer; of more, counts take a mebibyte each
LINE = tl.constexpr(128)  # of a row, which are counted together for an id
LINES = 128  # at once, at most
NEAR = tl.constexpr(NEAR_TIE)


@triton.jit
def _place(x):
    """0 for a NaN, then in the order of falling numbers; 0 and −0 are equals."""
    wide = x.to(tl.float32)
    bits = tl.where(wide == 0, 0, x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    place = tl.where(bits >= 0x8000, bits, 0x7FFF - bits)
    return tl.where(wide != wide, 0, place)


@triton.jit
def _number(place, TYPE: tl.constexpr):
    bits = tl.where(place >= 0x8000, place, 0x7FFF - place)
    return bits.to(tl.int16).to(TYPE, bitcast=True).to(tl.float64)


@triton.jit
def counted(logits, counts, best, V, V_ROW, SOME: tl.constexpr, EARLY: tl.constexpr):
    """counts [B, NUMBERS], which were 0, and best [B]: the place of a row's best, which was NUMBERS."""
    row = tl.program_id(1)
    i = tl.program_id(0) * SOME + tl.arange(0, SOME)
    ready(EARLY)
    x = tl.load(logits + row.to(tl.int64) * V_ROW + i, mask=i < V, other=-float("inf"))
    place = _place(x)
    tl.atomic_add(counts + row.to(tl.int64) * NUMBERS + place, 1, mask=i < V, sem="relaxed")
    tl.atomic_min(best + row, tl.min(tl.where(i < V, place, NUMBERS), 0), sem="relaxed")


@triton.jit
def _share(place, first, temperature, TYPE: tl.constexpr):
    """e^((z − best)/temperature) of the numbers at places, where +inf, better than any number, is 0 among −inf; and z."""
    z = _number(place, TYPE)
    best = _number(first, TYPE)
    z = tl.where(best == float("inf"), tl.where(z == float("inf"), 0.0, -float("inf")), z)
    best = tl.where(best == float("inf"), 0.0, best)
    far = tl.abs(best / temperature) < float("inf")
    scaled = tl.where(far, z / temperature - best / temperature, (z - best) / temperature)
    return tl.exp(tl.where(scaled <= 0, scaled, 0.0)), z  # no id has a number above the best, or all are in trouble


@triton.jit
def summed(counts, best, temperature, along, upto, part, TYPE: tl.constexpr, EARLY: tl.constexpr):
    """along and upto [B, NUMBERS]: sums and ids from a block's beginning to each number; part [B, 4, BLOCKS]: its sum, ids, ids with a
    probability, and least finite z. counts are 0 again."""
    row = tl.program_id(1)
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    own = row.to(tl.int64) * NUMBERS + i
    ready(EARLY)
    count = tl.load(counts + own)
    p, z = _share(i, tl.load(best + row), tl.load(temperature), TYPE)
    p = tl.where(count > 0, p, 0.0)
    loaded()
    tl.store(counts + own, 0)
    tl.store(along + own, tl.cumsum(p * count, 0))
    tl.store(upto + own, tl.cumsum(count, 0))
    to = part + row * 4 * BLOCKS + block
    tl.store(to, tl.sum(p * count, 0))
    tl.store(to + BLOCKS, tl.sum(count, 0).to(tl.float64))
    tl.store(to + 2 * BLOCKS, tl.sum(tl.where(p != 0, count, 0), 0).to(tl.float64))
    tl.store(to + 3 * BLOCKS, tl.min(tl.where((count > 0) & (tl.abs(z) < float("inf")), z, float("inf")), 0))


@triton.jit
def _at(values, b, i):
    """values[i] of a vector along b, for each of i."""
    return tl.sum(tl.where(b[None, :] == i[:, None], values[None, :], 0), 1)


@triton.jit
def _found(upto, ids, b, i):
    """For places i [4] in the row: the number there, and how many of its ids come before."""
    ends = tl.cumsum(ids, 0)
    block = tl.minimum(tl.sum((ends[None, :] <= i[:, None]).to(tl.int32), 1), BLOCKS - 1)
    before = _at(ends - ids, b, block)
    k = tl.arange(0, BLOCK)
    e = before[:, None] + tl.load(upto + block[:, None] * BLOCK + k[None, :])
    inside = tl.minimum(tl.sum((e <= i[:, None]).to(tl.int32), 1), BLOCK - 1)
    under = tl.max(tl.where(k[None, :] < inside[:, None], e, before[:, None]), 1)
    return block * BLOCK + inside, i - under


@triton.jit
def _sum(along, starts, b, number, beside, share):
    """Sums along the row up to the id that has `beside` of its equals before it, each with the probability `share`."""
    block = number // BLOCK
    inside = number % BLOCK
    under = tl.load(along + number - 1, mask=inside > 0, other=0.0)
    return _at(starts, b, block) + under + (beside + 1) * share


@triton.jit
def _below(along, upto, sums, starts, ids, b, t, equal, first, temperature, V, TYPE: tl.constexpr):
    """For each t [4], how many sums along the row are less, or equal where it says so."""
    ends = starts + sums
    e = ends[None, :]
    block = tl.sum(((e < t[:, None]) | (equal[:, None] & (e == t[:, None]))).to(tl.int32), 1)
    all_of_them = block >= BLOCKS
    block = tl.minimum(block, BLOCKS - 1)
    start = _at(starts, b, block)
    k = tl.arange(0, BLOCK)
    at = block[:, None] * BLOCK + k[None, :]
    e = start[:, None] + tl.load(along + at)
    inside = tl.sum(((e < t[:, None]) | (equal[:, None] & (e == t[:, None]))).to(tl.int32), 1)
    end = inside >= BLOCK
    inside = tl.minimum(inside, BLOCK - 1)
    before = tl.max(tl.where(k[None, :] < inside[:, None], e, start[:, None]), 1)
    n = tl.load(upto + at)
    under = tl.max(tl.where(k[None, :] < inside[:, None], n, 0), 1)
    own = tl.max(tl.where(k[None, :] == inside[:, None], n, 0), 1) - under
    share, _ = _share(block * BLOCK + inside, first, temperature, TYPE)
    fits = (t - before) / tl.where(share > 0, share, 1.0)
    fits = tl.where(equal, tl.floor(fits), tl.ceil(fits) - 1)
    some = tl.minimum(tl.maximum(fits, 0.0), own.to(tl.float64)).to(tl.int32)
    some = tl.where(end, own, tl.where(share > 0, some, 0))
    counted_before = _at(tl.cumsum(ids, 0) - ids, b, block)
    return tl.where(all_of_them, V, tl.minimum(counted_before + under + some, V))


@triton.jit
def chosen(
    best, along, upto, part, uniform, temperature, top_k, top_p, number, where, ties, trouble, V, B, TYPE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Row `number` of ties and trouble [·, B], and where [B, 2]: the number that is drawn with uniform [·, B], and how many of its ids come
    before. trouble: 1 for a NaN, 2 for −inf alone. best is NUMBERS again."""
    row = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    lane = tl.arange(0, 4)
    ready(EARLY)
    along += row.to(tl.int64) * NUMBERS
    upto += row.to(tl.int64) * NUMBERS
    part += row * 4 * BLOCKS
    out = tl.load(number) * B + row
    u = tl.load(uniform + out)
    t = tl.load(temperature)
    first = tl.load(best + row)
    sums = tl.load(part + b)
    has = tl.load(part + BLOCKS + b).to(tl.int32)
    some = tl.sum(tl.load(part + 2 * BLOCKS + b), 0).to(tl.int32)
    least = tl.min(tl.load(part + 3 * BLOCKS + b), 0)
    starts = tl.cumsum(sums, 0) - sums
    near = tl.sum(sums, 0) * NEAR
    k = tl.load(top_k)
    kept = tl.where((k > 0) & (k < V), k, V).to(tl.int32)
    share = tl.load(top_p)
    place, beside = _found(upto, has, b, kept - 1 + 0 * lane)
    p, _ = _share(place, first, t, TYPE)
    enough = share * _sum(along, starts, b, place, beside, p)
    # what top_p keeps at least, as it is, and at most; the best stays
    cut = 1 + _below(along, upto, sums, starts, has, b, enough + (lane - 1) * near, lane < 0, first, t, V, TYPE)
    cut = tl.where(share < 1, tl.minimum(cut, kept), kept)
    place, beside = _found(upto, has, b, cut - 1)
    p, _ = _share(place, first, t, TYPE)
    drawn = u * _sum(along, starts, b, place, beside, p)
    low = tl.sum(tl.where(lane == 0, drawn, 0.0), 0) - near
    here = tl.sum(tl.where(lane == 1, drawn, 0.0), 0)
    high = tl.sum(tl.where(lane == 2, drawn, 0.0), 0) + near
    found = _below(along, upto, sums, starts, has, b, tl.where(lane == 0, low, here), lane == 1, first, t, V, TYPE)
    last = tl.minimum(cut, some) - 1
    place, beside = _found(upto, has, b, tl.minimum(found, V - 1))
    p, _ = _share(place, first, t, TYPE)
    edge = tl.sum(tl.where(lane == 0, found, 0), 0)
    tie = (edge < tl.sum(tl.where(lane == 2, last, 0), 0)) & (
        tl.sum(tl.where(lane == 0, _sum(along, starts, b, place, beside, p), 0.0), 0) <= high
    )
    rank = tl.maximum(tl.sum(tl.where(lane == 1, tl.minimum(found, last), 0), 0), 0)
    place, beside = _found(upto, has, b, tl.minimum(tl.maximum(rank + lane - 1, 0), V - 1))  # before it, itself, after it
    _, z = _share(place, first, t, TYPE)
    top = _number(first, TYPE)
    margin = (tl.where(top == float("inf"), 0.0, top) / 2 - least / 2) * NEAR  # halves, so that no difference overflows
    before = tl.sum(tl.where(lane == 0, z / 2, 0.0), 0)
    own = tl.sum(tl.where(lane == 1, z / 2, 0.0), 0)
    after = tl.sum(tl.where(lane == 2, z / 2, 0.0), 0)
    tie = tie | ((rank > 0) & (before - own <= margin)) | ((rank + 1 < V) & (own - after <= margin))
    tl.store(where + 2 * row, tl.sum(tl.where(lane == 1, place, 0), 0))
    tl.store(where + 2 * row + 1, tl.sum(tl.where(lane == 1, beside, 0), 0))
    tl.store(ties + out, tie)
    tl.store(trouble + out, tl.where(top != top, 1, tl.where(top == -float("inf"), 2, 0)))
    loaded()
    tl.store(best + row, NUMBERS)


@triton.jit
def named(logits, where, number, ids, token, V, V_ROW, B, LINES: tl.constexpr, EARLY: tl.constexpr):
    """Row `number` of ids [·, B], and token [B]: the id of a number that has as many equals before it as where [B, 2] says."""
    row = tl.program_id(0)
    line = tl.arange(0, LINES)
    within = tl.arange(0, LINE)
    ready(EARLY)
    logits += row.to(tl.int64) * V_ROW
    mine = tl.load(where + 2 * row)
    turn = tl.load(where + 2 * row + 1)
    id = 0
    for start in range(0, V, LINES * LINE):
        i = start + line[:, None] * LINE + within[None, :]
        each = tl.sum(((_place(tl.load(logits + i, mask=i < V, other=0.0)) == mine) & (i < V)).to(tl.int32), 1)
        here = tl.sum((tl.cumsum(each, 0) <= turn).to(tl.int32), 0)
        before = tl.sum(tl.where(line < here, each, 0), 0)
        if (turn >= 0) & (here < LINES):
            at = start + here * LINE + within
            same = ((_place(tl.load(logits + at, mask=at < V, other=0.0)) == mine) & (at < V)).to(tl.int32)
            id = tl.sum(tl.where((same > 0) & (tl.cumsum(same, 0) == turn - before + 1), at, 0), 0)
        turn -= tl.sum(each, 0)
    tl.store(ids + tl.load(number) * B + row, id.to(tl.int64))
    tl.store(token + row, id.to(tl.int64))


class Counts:
    """What `draw` counts in: [B, NUMBERS] zeros, and where the best of each row is."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.counts = torch.zeros((batch, NUMBERS.value), dtype=torch.int32, device=device)
        self.where = torch.zeros((batch, 2), dtype=torch.int32, device=device)
        self.best = torch.full((batch,), NUMBERS.value, dtype=torch.int32, device=device)


def draw(
    held: Counts, logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, number: Tensor, ids: Tensor,
    ties: Tensor, trouble: Tensor, token: Tensor,
) -> None:  # fmt: skip
    """As draw.py's, of logits [B, V] of 16 bits, each row in one piece."""
    (batch, vocabulary), how = logits.shape, {"num_warps": 4, **launch(logits.device)}
    along, upto = uniform.new_empty(held.counts.shape), torch.empty_like(held.counts)
    part, kind = uniform.new_empty((batch, 4, BLOCKS.value)), getattr(tl, str(logits.dtype).removeprefix("torch."))
    counted[(triton.cdiv(vocabulary, SOME), batch)](logits, held.counts, held.best, vocabulary, logits.stride(0), SOME=SOME, **how)
    summed[(BLOCKS.value, batch)](held.counts, held.best, temperature, along, upto, part, TYPE=kind, **{**how, "num_warps": 1})
    chosen[(batch,)](
        held.best, along, upto, part, uniform, temperature, top_k, top_p, number, held.where, ties, trouble, vocabulary, batch, TYPE=kind,
        **{**how, "num_warps": 1},
    )  # fmt: skip
    lines = min(LINES, triton.next_power_of_2(triton.cdiv(vocabulary, LINE.value)))
    named[(batch,)](
        logits, held.where, number, ids, token, vocabulary, logits.stride(0), batch, LINES=lines, **{**how, "num_warps": min(16, lines)}
    )
