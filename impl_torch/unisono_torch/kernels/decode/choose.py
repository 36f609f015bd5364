"""The best id of each row of logits, and whether it was a near-tie, as unisono_spec.contract.sampling has it; written where the loop reads.

Two launches: the two best of each block of a row, then of all blocks.
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

BLOCK = 2048
NEAR = tl.constexpr(NEAR_TIE)


@triton.jit
def blocks(logits, part, where, V, V_ROW, COUNT, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """part [B, 4, COUNT]: the best of a block, the second best, the least finite, and 1 where there is a NaN. where [B, COUNT]: its id."""
    row = tl.program_id(1)
    block = tl.program_id(0)
    ready(EARLY)
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * V_ROW + i, mask=i < V, other=-float("inf")).to(tl.float32)
    nan = x != x
    x = tl.where(nan, -float("inf"), x)
    best = tl.max(x, 0)
    first = tl.min(tl.where((x == best) & (i < V), i, 2147483647), 0)
    second = tl.max(tl.where(i == first, -float("inf"), x), 0)
    finite = (x > -float("inf")) & (x < float("inf"))
    to = part + row * 4 * COUNT + block
    tl.store(to, best)
    tl.store(to + COUNT, second)
    tl.store(to + 2 * COUNT, tl.min(tl.where(finite, x, float("inf")), 0))
    tl.store(to + 3 * COUNT, tl.max(nan.to(tl.float32), 0))
    tl.store(where + row * COUNT + block, first)


@triton.jit
def whole(part, where, number, ids, ties, trouble, token, B, COUNT, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Row `number` of ids, ties and trouble [·, B], and token [B]. trouble: 1 for a NaN, 2 for a row of −inf alone."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    ready(EARLY)
    on = i < COUNT
    at = part + row * 4 * COUNT + i
    best = tl.load(at, mask=on, other=-float("inf"))
    second = tl.load(at + COUNT, mask=on, other=-float("inf"))
    least = tl.min(tl.load(at + 2 * COUNT, mask=on, other=float("inf")), 0)
    nan = tl.max(tl.load(at + 3 * COUNT, mask=on, other=0.0), 0)
    id = tl.load(where + row * COUNT + i, mask=on, other=2147483647)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, id, 2147483647), 0)
    rest = tl.maximum(tl.max(tl.where(id == first, second, best), 0), -float("inf"))
    # differences of halves do not overflow, and in float64 lose no digit; beside +inf nothing has a distance, −inf is far from all
    high = tl.where(tl.abs(top) < float("inf"), top, 0.0).to(tl.float64) / 2
    low = tl.where(tl.abs(rest) < float("inf"), rest, 0.0).to(tl.float64) / 2
    near = high - low <= (high - tl.minimum(least.to(tl.float64) / 2, high)) * NEAR
    tie = tl.where(top == float("inf"), rest == top, near & (rest > -float("inf")))
    out = tl.load(number) * B + row
    tl.store(ids + out, first.to(tl.int64))
    tl.store(ties + out, tie)
    tl.store(trouble + out, tl.where(nan > 0, 1, tl.where(top == -float("inf"), 2, 0)))
    tl.store(token + row, first.to(tl.int64))


def choose(logits: Tensor, number: Tensor, ids: Tensor, ties: Tensor, trouble: Tensor, token: Tensor) -> None:
    """logits [B, V], each row in one piece → ids, ties and trouble [·, B] at row `number` [], and token [B]."""
    batch, vocabulary = logits.shape
    count = triton.cdiv(vocabulary, BLOCK)
    part = logits.new_empty((batch, 4, count), dtype=logits.new_empty(0).float().dtype)
    where = ids.new_empty((batch, count), dtype=number.new_empty(0).int().dtype)
    blocks[(count, batch)](logits, part, where, vocabulary, logits.stride(0), count, BLOCK=BLOCK, num_warps=4, **launch(logits.device))
    given = part, where, number, ids, ties, trouble, token, batch, count
    whole[(batch,)](*given, BLOCK=triton.next_power_of_2(count), num_warps=1, **launch(logits.device))
