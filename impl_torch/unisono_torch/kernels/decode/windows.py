"""One token of attention over a window wider than a program holds: pieces of it are read, and move one place on, beside each other."""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode.attention import LOG2E, turned
from unisono_torch.kernels.decode.common import done, last, loaded, ready
from unisono_torch.kernels.decode.project import Finish, finished

PIECE = 64  # slots that a program reads, at least
BLOCK = 64  # of them at once, at most
PIECES = 128  # of a window, at most
PROGRAMS = 1056  # of all heads, about: of more sequences, each reads more


@triton.jit
def wide_window(
    qkv, keys, values, count, cos, sin, part, edge, o, turns, W, bias, residual, out, counters, gain, shift, normed, blocks, N, scale,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, PIECES: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, ROPE: tl.constexpr,
    BK: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
    NEXT: tl.constexpr, NEXT_EPS: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """keys and values [B, WIDTH, H, K], oldest first, move one place on; count [B]: tokens read before this one. out: see `finished`.

    A piece of SLOTS slots leaves its maximum, sum and weighted values in part [B·H, PIECES, K + 2], and in edge [B·H, PIECES, 2, K] what
    its first slot held, which the piece before it still reads beside: the last of a head's to come puts it there, and makes o of all.
    """
    if PROGRAMS > 0 and tl.program_id(0) >= STEPS:
        finished(
            tl.program_id(0) - STEPS, o, W, bias, residual, out, counters, gain, shift, normed, blocks, N, HEADS * K, BATCH,
            STEPS // PIECES, PROGRAMS, HAS_BIAS, HAS_RESIDUAL, ROWS, COLUMNS, TALL, SPLIT, DOT, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER,
            EARLY,
        )  # fmt: skip
    else:
        owner = tl.program_id(0) // PIECES
        piece = tl.program_id(0) % PIECES
        row = owner // HEADS
        head = owner % HEADS
        own = qkv + row * (3 * HEADS * K) + head * K
        i = tl.arange(0, BK)
        inside = i < K
        TYPE: tl.constexpr = qkv.dtype.element_ty
        cos += row * (K // 2)
        sin += row * (K // 2)
        ready(EARLY)
        q = turned(own, i, inside, cos, sin, K, ROPE).to(TYPE).to(tl.float32) * (scale * LOG2E)
        filled = WIDTH - tl.load(count + row)  # slots from here on hold tokens; the first of all leaves
        base = row.to(tl.int64) * WIDTH * HEADS * K + head * K + i[None, :]
        low = piece * SLOTS
        most = tl.full((), -float("inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        read = tl.zeros((BK,), tl.float32)
        edges = edge + (owner * PIECES + piece).to(tl.int64) * 2 * K + i[None, :]
        for start in range(low, tl.minimum(low + SLOTS, WIDTH), BLOCK):
            slot = start + tl.arange(0, BLOCK)
            here = (slot < low + SLOTS) & (slot < WIDTH)
            old = here & (slot >= filled) & (slot > 0)
            at = base + (slot * (HEADS * K)).to(tl.int64)[:, None]
            mask = old[:, None] & inside[None, :]
            kept = tl.load(keys + at, mask=mask, other=0.0)
            held = tl.load(values + at, mask=mask, other=0.0)
            loaded()
            moves = (here & (slot > low))[:, None] & inside[None, :]
            tl.store(keys + at - HEADS * K, kept, mask=moves)
            tl.store(values + at - HEADS * K, held, mask=moves)
            first = (slot == low)[:, None] & inside[None, :]
            to = edges + 0 * slot[:, None]
            tl.store(to, kept, mask=first)
            tl.store(to + K, held, mask=first)
            score = tl.where(old, tl.sum(kept * q[None, :], 1), -float("inf"))
            new = tl.maximum(most, tl.max(score, 0))
            least = tl.where(new > -float("inf"), new, 0.0)  # of no token yet
            weight = tl.exp2(score - least)
            fade = tl.exp2(most - least)
            total = total * fade + tl.sum(weight, 0)
            read = read * fade + tl.sum(weight[:, None] * held, 0)
            most = new
        to = part + (owner * PIECES + piece) * (K + 2)
        tl.store(to, most)
        tl.store(to + 1, total)
        tl.store(to + 2 + i, read, mask=inside)
        if last(turns + owner, PIECES):
            loaded()
            k = turned(own + HEADS * K, i, inside, cos, sin, K, ROPE).to(TYPE).to(tl.float32)
            v = tl.load(own + 2 * HEADS * K + i, mask=inside, other=0.0).to(tl.float32)
            score = tl.sum(k * q, 0)
            pieces = tl.arange(0, PIECES)
            at = part + (owner * PIECES + pieces) * (K + 2)
            high = tl.load(at)
            top = tl.maximum(tl.max(high, 0), score)
            share = tl.exp2(high - top)
            newest = tl.exp2(score - top)
            whole = tl.sum(share * tl.load(at + 1), 0) + newest
            held = tl.load(at[:, None] + 2 + i[None, :], mask=inside[None, :], other=0.0)
            found = (tl.sum(share[:, None] * held, 0) + newest * v) / whole
            tl.store(o + owner * K + i, found.to(TYPE), mask=inside)
            done(counters, TOGETHER)
            mask = ((pieces > 0) & (pieces * SLOTS < WIDTH))[:, None] & inside[None, :]
            from_ = edge + (owner * PIECES + pieces).to(tl.int64)[:, None] * 2 * K + i[None, :]
            at = base + ((pieces * SLOTS - 1) * (HEADS * K)).to(tl.int64)[:, None]
            tl.store(keys + at, tl.load(from_, mask=mask, other=0.0), mask=mask)
            tl.store(values + at, tl.load(from_ + K, mask=mask, other=0.0), mask=mask)
            at = row.to(tl.int64) * WIDTH * HEADS * K + (WIDTH - 1) * HEADS * K + head * K + i
            tl.store(keys + at, k, mask=inside)
            tl.store(values + at, v, mask=inside)


def window_step(
    qkv: Tensor, keys: Tensor, values: Tensor, count: Tensor, rotary: tuple[Tensor, Tensor] | None, finish: Finish, x: Tensor | None
) -> Tensor:
    """qkv [B, 3·H·K], keys and values [B, w, H, K], which move on, count [B] → what `finish` makes of o [B, H·K]."""
    batch, w, heads, k = keys.shape
    most = max(1, triton.next_power_of_2(PROGRAMS // (batch * heads)))
    pieces = min(PIECES, triton.next_power_of_2(triton.cdiv(w, PIECE)), most)
    slots = triton.cdiv(w, pieces)
    part, edge = keys.new_empty((batch * heads, pieces, k + 2)), keys.new_empty((batch * heads, pieces, 2, k))
    o = qkv.new_empty((batch, heads * k))
    cos, sin = (part, part) if rotary is None else rotary
    programs, out, given = finish.launched(batch * heads * pieces, o, x)
    wide_window[(programs,)](
        qkv, keys, values, count, cos, sin, part, edge, o, finish.turns, scale=k**-0.5, WIDTH=w, SLOTS=slots, PIECES=pieces, HEADS=heads,
        K=k, ROPE=rotary is not None, BK=triton.next_power_of_2(k), BLOCK=min(BLOCK, triton.next_power_of_2(slots)), **given,
    )  # fmt: skip
    return finish.after(out, x)
