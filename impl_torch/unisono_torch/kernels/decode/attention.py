"""One token of linear, window and softmax attention, with its rotation and its feature map, in place of the state before it.

q, k, v stand side by side as the projection made them, [B, H·K + H·K + H·V]; a program owns a head of a sequence, or with softmax attention
a piece of its cache.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode.common import NORMS, done, last, launch, loaded, ready
from unisono_torch.kernels.decode.common import normed as normed_row
from unisono_torch.kernels.decode.project import NO_NORM, Finish, finished
from unisono_torch.kernels.decode.tiles import Norm
from unisono_torch.kernels.gelu import sigmoid

LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(1e-6)
MAPS = {"elu1": 0, "relu": 1, "learned": 2, "taylor2": 3, "none": 4}  # none: features are given
FEATURES = 16, 64  # at once, at least and at most
PIECE = 64  # slots of a cache that a program reads, at least
PIECES = 128  # of a cache, at most


@triton.jit
def angles(position, table, cos, sin, HALF: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """cos and sin [B, HALF] of position [B] from the digits' table [2, 4, 256, HALF] (ops/rotary.py)."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    ready(EARLY)
    p = tl.load(position + row)
    at = table + (p & 255) * HALF + i
    c = tl.load(at, mask=inside, other=0.0)
    s = tl.load(at + 4 * 256 * HALF, mask=inside, other=0.0)
    for place in tl.static_range(1, 4):
        at = table + (place * 256 + ((p >> (8 * place)) & 255)) * HALF + i
        c2 = tl.load(at, mask=inside, other=0.0)
        s2 = tl.load(at + 4 * 256 * HALF, mask=inside, other=0.0)
        old = c
        c = c * c2 - s * s2
        s = old * s2 + s * c2
    tl.store(cos + row * HALF + i, c, mask=inside)
    tl.store(sin + row * HALF + i, s, mask=inside)


@triton.jit
def turned(p, i, mask, cos, sin, K: tl.constexpr, ROPE: tl.constexpr):
    """Elements i of a head of K at p, float32, turned by the angles at cos and sin."""
    x = tl.load(p + i, mask=mask, other=0.0).to(tl.float32)
    if ROPE:
        HALF: tl.constexpr = K // 2
        other = tl.load(p + (i + HALF) % K, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cos + i % HALF, mask=mask, other=0.0)
        s = tl.load(sin + i % HALF, mask=mask, other=0.0)
        x = x * c + tl.where(i < HALF, -other, other) * s
    return x


@triton.jit
def _features(p, f, F: tl.constexpr, K: tl.constexpr, tau, cos, sin, MAP: tl.constexpr, ROPE: tl.constexpr):
    """Elements f of φ of the head at p; 0 from F on."""
    if MAP == 3:
        i = tl.where(f <= K, f - 1, (f - 1 - K) // K)
        j = tl.where(f <= K, 0, (f - 1 - K) % K)
        inside = (f > 0) & (f < F)
        x = turned(p, i, inside, cos, sin, K, ROPE)
        y = turned(p, j, inside & (f > K), cos, sin, K, ROPE)
        x = tl.where(f <= K, x / tl.sqrt(tl.sqrt(K * 1.0)), x * y / tl.sqrt(2.0 * K))
        x = tl.where(f == 0, 1.0, x)
    else:
        x = turned(p, f, f < F, cos, sin, K, ROPE)
        if MAP == 2:
            x = x * tl.load(tau).to(tl.float32)
        if MAP < 4:
            below = tl.exp2(tl.where(x > 0, 0.0, x) * LOG2E)
            x = tl.where(x < 0, 0.0, x)  # a GPU's greater of two numbers would be the one that is no NaN
            if MAP != 1:
                x += below
    return tl.where(f < F, x, 0.0)


@triton.jit
def linear(
    qkv, S, z, tau, cos, sin, head_gain, o, turns, W, bias, residual, out, counters, gain, shift, normed, blocks, N, HEADS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, ROPE: tl.constexpr, BF: tl.constexpr, SLICES: tl.constexpr,
    BV: tl.constexpr, HEAD_NORM: tl.constexpr, HEAD_EPS: tl.constexpr, STEPS: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, NEXT: tl.constexpr, NEXT_EPS: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """S [B, H, F, V] and z [B, H, F] grow by this token; o [B, H·V] is what it reads of them, SLICES programs a head, or its norm by
    heads, each in one program.

    PROGRAMS more turn o into out: see `finished`.
    """
    if PROGRAMS > 0 and tl.program_id(0) >= STEPS:
        finished(
            tl.program_id(0) - STEPS, o, W, bias, residual, out, counters, gain, shift, normed, blocks, N, HEADS * V, BATCH, STEPS,
            PROGRAMS, HAS_BIAS, HAS_RESIDUAL, ROWS, COLUMNS, TALL, SPLIT, DOT, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER, EARLY,
        )  # fmt: skip
    else:
        owner = tl.program_id(0) // SLICES
        row = owner // HEADS
        head = owner % HEADS
        own = qkv + row * HEADS * (2 * K + V)
        v = (tl.program_id(0) % SLICES) * BV + tl.arange(0, BV)
        ready(EARLY)
        value = tl.load(own + HEADS * 2 * K + head * V + v, mask=v < V, other=0.0).to(tl.float32)
        cos += row * (K // 2)
        sin += row * (K // 2)
        at = owner.to(tl.int64) * F
        top = tl.zeros((BV,), tl.float32)
        bottom = tl.zeros((1,), tl.float32)
        for low in range(0, F, BF):
            f = low + tl.arange(0, BF)
            q = _features(own + head * K, f, F, K, tau, cos, sin, MAP, ROPE)
            k = _features(own + HEADS * K + head * K, f, F, K, tau, cos, sin, MAP, ROPE)
            cell = S + (at + f)[:, None] * V + v[None, :]
            mask = (f < F)[:, None] & (v < V)[None, :]
            s = tl.load(cell, mask=mask, other=0.0) + k[:, None] * value[None, :]
            loaded()
            tl.store(cell, s, mask=mask)
            top += tl.sum(q[:, None] * s, 0)
            bottom += tl.sum(q * (tl.load(z + at + f, mask=f < F, other=0.0) + k), 0)
        TYPE: tl.constexpr = o.dtype.element_ty
        found = (top / (bottom + EPS)).to(TYPE)
        if HEAD_NORM > 0:
            found = normed_row(found.to(tl.float32), v, V, head_gain, head_gain, HEAD_NORM, HEAD_EPS, TYPE).to(TYPE)
        tl.store(o + owner * V + v, found, mask=v < V)
        done(counters, TOGETHER)
        if last(turns + owner, SLICES):
            loaded()
            for low in range(0, F, BF):
                f = low + tl.arange(0, BF)
                k = _features(own + HEADS * K + head * K, f, F, K, tau, cos, sin, MAP, ROPE)
                total = tl.load(z + at + f, mask=f < F, other=0.0) + k
                loaded()
                tl.store(z + at + f, total, mask=f < F)


@triton.jit
def multiscale(
    qkv, gates, mix, S, z, tau, cos, sin, o, turns, W, bias, residual, out, counters, gain, shift, normed, blocks, N, HEADS: tl.constexpr,
    K: tl.constexpr, SCALES: tl.constexpr, DATA: tl.constexpr, VECTOR: tl.constexpr, MAP: tl.constexpr, ROPE: tl.constexpr,
    LATER: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, SLICES: tl.constexpr, BV: tl.constexpr, STEPS: tl.constexpr,
    BATCH: tl.constexpr, PROGRAMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TALL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, NEXT: tl.constexpr, NEXT_EPS: tl.constexpr,
    SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """S [B, 1 + SCALES, H, K, K] and z fade and grow; o [B, H·K]: what is read of them, mixed (ops/multiscale.py); out: see `finished`.

    gates [B, ·]: one a head's value or one in all, then one a scale where decays depend on data; else those are the end of mix, whose
    beginning are the scales' own weights. ROPE turns before φ, LATER after it, and the numerator only.
    """
    if PROGRAMS > 0 and tl.program_id(0) >= STEPS:
        finished(
            tl.program_id(0) - STEPS, o, W, bias, residual, out, counters, gain, shift, normed, blocks, N, HEADS * K, BATCH, STEPS,
            PROGRAMS, HAS_BIAS, HAS_RESIDUAL, ROWS, COLUMNS, TALL, SPLIT, DOT, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER, EARLY,
        )  # fmt: skip
    else:
        owner = tl.program_id(0) // SLICES
        row = owner // HEADS
        head = owner % HEADS
        own = qkv + row * (3 * HEADS * K) + head * K
        i = tl.arange(0, BK)
        inside = i < K
        v = (tl.program_id(0) % SLICES) * BV + tl.arange(0, BV)
        s = tl.arange(0, BS)
        weight = tl.load(mix + s, mask=s < SCALES, other=-float("inf")).to(tl.float32)
        ready(EARLY)
        weight = tl.exp2((weight - tl.max(weight, 0)) * LOG2E)
        weight = weight / tl.sum(weight, 0)
        cos += row * (K // 2)
        sin += row * (K // 2)
        q = _features(own, i, K, K, tau, cos, sin, MAP, ROPE)
        k = _features(own + HEADS * K, i, K, K, tau, cos, sin, MAP, ROPE)
        q_norm = q
        k_norm = k
        if LATER:
            HALF: tl.constexpr = K // 2
            other = (i + HALF) % K
            c = tl.load(cos + i % HALF, mask=inside, other=0.0)
            t = tl.load(sin + i % HALF, mask=inside, other=0.0)
            far = _features(own, tl.where(inside, other, K), K, K, tau, cos, sin, MAP, False)
            q = q * c + tl.where(i < HALF, -far, far) * t
            far = _features(own + HEADS * K, tl.where(inside, other, K), K, K, tau, cos, sin, MAP, False)
            k = k * c + tl.where(i < HALF, -far, far) * t
        value = tl.load(own + 2 * HEADS * K + v, mask=v < K, other=0.0).to(tl.float32)
        COUNT: tl.constexpr = (HEADS * K if VECTOR else 1) + (SCALES if DATA else 0)
        gates += row * COUNT
        gate = sigmoid(tl.load(gates + ((head * K + v) if VECTOR else v * 0), mask=v < K, other=0.0))
        read = tl.zeros((BV,), tl.float32)
        totals = ()
        for scale in tl.static_range(SCALES + 1):
            decay = 1.0
            share = gate
            if scale > 0:
                from_ = (gates + COUNT - SCALES) if DATA else (mix + SCALES)
                decay = sigmoid(tl.load(from_ + scale - 1).to(tl.float32))
                share = (1 - gate) * tl.sum(tl.where(s == scale - 1, weight, 0.0), 0)
            at = ((row * (SCALES + 1) + scale) * HEADS + head).to(tl.int64) * K
            cell = S + (at + i)[:, None] * K + v[None, :]
            mask = inside[:, None] & (v < K)[None, :]
            held = decay * tl.load(cell, mask=mask, other=0.0) + k[:, None] * value[None, :]
            loaded()
            tl.store(cell, held, mask=mask)
            total = decay * tl.load(z + at + i, mask=inside, other=0.0) + k_norm
            totals = totals + (total,)  # noqa: RUF005 (Triton's tuples grow by +)
            read += share * (tl.sum(q[:, None] * held, 0) / (tl.sum(q_norm * total, 0) + EPS))
        tl.store(o + owner * K + v, read.to(o.dtype.element_ty), mask=v < K)
        done(counters, TOGETHER)
        if last(turns + owner, SLICES):
            loaded()
            for scale in tl.static_range(SCALES + 1):
                at = ((row * (SCALES + 1) + scale) * HEADS + head).to(tl.int64) * K
                tl.store(z + at + i, totals[scale], mask=inside)


@triton.jit
def window(
    qkv, keys, values, count, cos, sin, o, W, bias, residual, out, counters, gain, shift, normed, blocks, N, scale, HEADS: tl.constexpr,
    K: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TALL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, NEXT: tl.constexpr, NEXT_EPS: tl.constexpr, SHARE: tl.constexpr,
    WHOLE: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """keys and values [B, WIDTH, H, K], oldest first, move one place on; count [B]: tokens read before this one. out: see `finished`."""
    if PROGRAMS > 0 and tl.program_id(0) >= STEPS:
        finished(
            tl.program_id(0) - STEPS, o, W, bias, residual, out, counters, gain, shift, normed, blocks, N, HEADS * K, BATCH, STEPS,
            PROGRAMS, HAS_BIAS, HAS_RESIDUAL, ROWS, COLUMNS, TALL, SPLIT, DOT, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER, EARLY,
        )  # fmt: skip
    else:
        row = tl.program_id(0) // HEADS
        head = tl.program_id(0) % HEADS
        own = qkv + row * (3 * HEADS * K) + head * K
        i = tl.arange(0, BK)
        inside = i < K
        TYPE: tl.constexpr = qkv.dtype.element_ty
        cos += row * (K // 2)
        sin += row * (K // 2)
        ready(EARLY)
        q = turned(own, i, inside, cos, sin, K, ROPE).to(TYPE).to(tl.float32)
        k = turned(own + HEADS * K, i, inside, cos, sin, K, ROPE).to(TYPE).to(tl.float32)
        v = tl.load(own + 2 * HEADS * K + i, mask=inside, other=0.0).to(tl.float32)
        slot = tl.arange(0, BW)
        filled = (slot < WIDTH) & (slot >= WIDTH - 1 - tl.load(count + row))
        at = ((row.to(tl.int64) * WIDTH + slot + 1) * HEADS + head)[:, None] * K + i[None, :]
        mask = (filled & (slot < WIDTH - 1))[:, None] & inside[None, :]
        here = (slot == WIDTH - 1)[:, None]
        kept = tl.where(here, k[None, :], tl.load(keys + at, mask=mask, other=0.0))
        held = tl.where(here, v[None, :], tl.load(values + at, mask=mask, other=0.0))
        score = tl.where(filled, tl.sum(kept * q[None, :], 1) * scale, -float("inf"))
        weight = tl.exp2((score - tl.max(score, 0)) * LOG2E)
        read = tl.sum(weight[:, None] * held, 0) / tl.sum(weight, 0)
        tl.store(o + (row * HEADS + head) * K + i, read.to(TYPE), mask=inside)
        done(counters, TOGETHER)
        loaded()
        to = at - HEADS * K
        mask = (slot < WIDTH)[:, None] & inside[None, :]
        tl.store(keys + to, kept, mask=mask)
        tl.store(values + to, held, mask=mask)


@triton.jit
def softmax(
    qkv, keys, values, count, cos, sin, part, o, turns, W, bias, residual, out, counters, gain, shift, normed, blocks, N, scale, CAPACITY,
    SLOTS, PIECES: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, ROPE: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, NEXT: tl.constexpr,
    NEXT_EPS: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What pieces of SLOTS slots make of this token's query: part [B·H, PIECES, K + 2], maximum, sum and weighted values. The last of a
    head's to come makes o [B, H·K] of all; out: see `finished`.

    keys and values [B, CAPACITY, H, K] receive this token at slot count [B].
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
        i = tl.arange(0, BK)
        inside = i < K
        ready(EARLY)
        here = tl.load(count + row)
        low = piece * SLOTS
        if low <= here:
            own = qkv + row * (3 * HEADS * K) + head * K
            TYPE: tl.constexpr = qkv.dtype.element_ty
            q = turned(own, i, inside, cos + row * (K // 2), sin + row * (K // 2), K, ROPE).to(TYPE).to(tl.float32) * (scale * LOG2E)
            k = turned(own + HEADS * K, i, inside, cos + row * (K // 2), sin + row * (K // 2), K, ROPE).to(TYPE)
            v = tl.load(own + 2 * HEADS * K + i, mask=inside, other=0.0)
            base = row.to(tl.int64) * CAPACITY * HEADS * K + head * K
            most = tl.full((), -float("inf"), tl.float32)
            total = tl.zeros((), tl.float32)
            read = tl.zeros((BK,), tl.float32)
            if here < low + SLOTS:
                at = base + here.to(tl.int64) * HEADS * K + i
                tl.store(keys + at, k.to(keys.dtype.element_ty), mask=inside)
                tl.store(values + at, v.to(values.dtype.element_ty), mask=inside)
                most = tl.sum(k.to(tl.float32) * q, 0)
                total += 1.0
                read += v.to(tl.float32)
            for start in range(low, tl.minimum(low + SLOTS, here), BLOCK):
                slot = start + tl.arange(0, BLOCK)
                old = (slot < low + SLOTS) & (slot < here)
                at = base + (slot.to(tl.int64) * HEADS * K)[:, None] + i[None, :]
                mask = old[:, None] & inside[None, :]
                score = tl.sum(tl.load(keys + at, mask=mask, other=0.0).to(tl.float32) * q[None, :], 1)
                held = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
                score = tl.where(old, score, -float("inf"))
                new = tl.maximum(most, tl.max(score, 0))
                fade = tl.exp2(most - new)
                weight = tl.exp2(score - new)
                total = total * fade + tl.sum(weight, 0)
                read = read * fade + tl.sum(weight[:, None] * held, 0)
                most = new
            to = part + (owner * PIECES + piece) * (K + 2)
            tl.store(to, most)
            tl.store(to + 1, total)
            tl.store(to + 2 + i, read, mask=inside)
        if last(turns + owner, PIECES):
            tl.debug_barrier()
            pieces = tl.arange(0, PIECES)
            on = pieces * SLOTS <= here
            at = part + (owner * PIECES + pieces) * (K + 2)
            high = tl.load(at, mask=on, other=-float("inf"))
            share = tl.where(on, tl.exp2(high - tl.max(high, 0)), 0.0)
            whole = tl.sum(share * tl.load(at + 1, mask=on, other=0.0), 0)
            held = tl.load(at[:, None] + 2 + i[None, :], mask=on[:, None] & inside[None, :], other=0.0)
            tl.store(o + owner * K + i, (tl.sum(share[:, None] * held, 0) / whole).to(o.dtype.element_ty), mask=inside)
            done(counters, TOGETHER)


def cos_sin(position: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """position [B] int32, table [2, 4, 256, K/2] float32 → cos and sin [B, K/2]."""
    half = table.shape[-1]
    cos, sin = (table.new_empty((len(position), half)) for _ in range(2))
    angles[(len(position),)](
        position, table, cos, sin, HALF=half, BLOCK=triton.next_power_of_2(half), num_warps=1, **launch(position.device)
    )
    return cos, sin


def _slices(owners: int, width: int) -> int:
    """Programs a head: enough of them where heads are few, each with 16 columns or more."""
    slices = 1
    while owners * slices < 64 and width % (32 * slices) == 0:
        slices *= 2
    return slices


def linear_step(
    qkv: Tensor, S: Tensor, z: Tensor, width: int, feature_map: str, tau: Tensor | None, rotary: tuple[Tensor, Tensor] | None,
    finish: Finish, x: Tensor | None, norm: Norm = NO_NORM,
) -> Tensor:  # fmt: skip
    """qkv [B, H·(2K + V)], S [B, H, F, V] and z, which are advanced → what `finish` makes of o [B, H·V], on x [B, D]. width: K. norm: of
    each head's o."""
    batch, heads, features, v = S.shape
    o = qkv.new_empty((batch, heads * v))
    cos, sin = (z, z) if rotary is None else rotary
    block, slices = (
        min(FEATURES[1], max(FEATURES[0], triton.next_power_of_2(features))),
        _slices(batch * heads, v) if norm[0] == "none" else 1,
    )
    programs, out, given = finish.launched(batch * heads * slices, o, x)
    linear[(programs,)](
        qkv, S, z, tau, cos, sin, norm[1], o, finish.turns, HEADS=heads, K=width, V=v, F=features, MAP=MAPS[feature_map],
        ROPE=rotary is not None, BF=block, SLICES=slices, BV=triton.next_power_of_2(v // slices), HEAD_NORM=NORMS[norm[0]],
        HEAD_EPS=norm[3], **given,
    )  # fmt: skip
    return finish.after(out, x)


def multiscale_step(
    qkv: Tensor, gates: Tensor, mix: Tensor, S: Tensor, z: Tensor, vector: bool, feature_map: str, tau: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None, later: bool, finish: Finish, x: Tensor | None,
) -> Tensor:  # fmt: skip
    """qkv [B, 3·H·K], S [B, M, H, K, K] and z, which are advanced → what `finish` makes of o [B, H·K]. gates, mix: as the kernel takes
    them, float32."""
    batch, memories, heads, k, _ = S.shape
    o, scales = qkv.new_empty((batch, heads * k)), memories - 1
    cos, sin = (z, z) if rotary is None else rotary
    slices = _slices(batch * heads, k)
    programs, out, given = finish.launched(batch * heads * slices, o, x)
    multiscale[(programs,)](
        qkv, gates, mix, S, z, tau, cos, sin, o, finish.turns, HEADS=heads, K=k, SCALES=scales,
        DATA=gates.shape[1] > (heads * k if vector else 1), VECTOR=vector, MAP=MAPS[feature_map], ROPE=rotary is not None and not later,
        LATER=rotary is not None and later, BK=triton.next_power_of_2(k), BS=triton.next_power_of_2(scales), SLICES=slices,
        BV=triton.next_power_of_2(k // slices), **given,
    )  # fmt: skip
    return finish.after(out, x)


def window_step(
    qkv: Tensor, keys: Tensor, values: Tensor, count: Tensor, rotary: tuple[Tensor, Tensor] | None, finish: Finish, x: Tensor | None
) -> Tensor:
    """qkv [B, 3·H·K], keys and values [B, w, H, K], which move on, count [B] → what `finish` makes of o [B, H·K]."""
    batch, w, heads, k = keys.shape
    o = qkv.new_empty((batch, heads * k))
    cos, sin = (keys, keys) if rotary is None else rotary
    programs, out, given = finish.launched(batch * heads, o, x)
    window[(programs,)](
        qkv, keys, values, count, cos, sin, o, scale=k**-0.5, HEADS=heads, K=k, WIDTH=w, ROPE=rotary is not None,
        BK=triton.next_power_of_2(k), BW=triton.next_power_of_2(w), **given,
    )  # fmt: skip
    return finish.after(out, x)


def softmax_step(
    qkv: Tensor, keys: Tensor, values: Tensor, count: Tensor, rotary: tuple[Tensor, Tensor] | None, finish: Finish, x: Tensor | None
) -> Tensor:
    """qkv [B, 3·H·K], caches [B, capacity, H, K], which receive this token, count [B] → what `finish` makes of o [B, H·K]."""
    batch, capacity, heads, k = keys.shape
    pieces = min(PIECES, triton.next_power_of_2(triton.cdiv(capacity, PIECE)), max(1, triton.next_power_of_2(1056 // (batch * heads))))
    part = count.new_empty((batch * heads, pieces, k + 2), dtype=keys.new_empty(0).float().dtype)
    o = qkv.new_empty((batch, heads * k))
    cos, sin = (part, part) if rotary is None else rotary
    programs, out, given = finish.launched(batch * heads * pieces, o, x)
    softmax[(programs,)](
        qkv, keys, values, count, cos, sin, part, o, finish.turns, scale=k**-0.5, CAPACITY=capacity, SLOTS=triton.cdiv(capacity, pieces),
        PIECES=pieces, HEADS=heads, K=k, ROPE=rotary is not None, BK=triton.next_power_of_2(k), BLOCK=64, **given,
    )  # fmt: skip
    return finish.after(out, x)
