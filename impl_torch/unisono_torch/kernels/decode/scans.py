"""One token of a Mamba block's convolution and selective scan, of a gated convolution and of S4D's recurrence, in place."""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode import project, tiles
from unisono_torch.kernels.decode.common import done, dot_of, exact_gelu, kind_of, launch, left, loaded, ready, waited
from unisono_torch.kernels.decode.project import MOST, Finish, finished, row_convolved, rows_multiplied, rows_of
from unisono_torch.kernels.decode.tiles import summed
from unisono_torch.kernels.gelu import sigmoid
from unisono_torch.kernels.selective_scan.functions import softplus

CHANNELS = 8  # that a program of few sequences owns
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _convolved(x, weight, bias, state, c, mask, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Channels c of the convolution at this token, float32: x [D], weight [D, 1, TAPS], state [TAPS − 1, D]."""
    y = tl.load(x + c, mask=mask, other=0.0).to(tl.float32) * tl.load(weight + c * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        y += tl.load(state + tap * D + c, mask=mask, other=0.0) * tl.load(weight + c * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _moved(x, state, c, mask, D: tl.constexpr, TAPS: tl.constexpr):
    for tap in tl.static_range(TAPS - 2):
        tl.store(state + tap * D + c, tl.load(state + (tap + 1) * D + c, mask=mask, other=0.0), mask=mask)
    if TAPS > 1:
        tl.store(state + (TAPS - 2) * D + c, tl.load(x + c, mask=mask, other=0.0).to(tl.float32), mask=mask)


@triton.jit
def scanned(
    place, row, uz, inner, dt_weight, dt_bias, A_log, skip, h, o, counters, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    CHANNELS: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, ARRIVALS: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """o [B, D] = y ∘ SiLU(z) of uz [B, 2·D] and inner [B, RANK + 2·N]: δ, B and C; h [B, D, N] advances. CHANNELS of a row, from place on.

    ARRIVALS programs of this launch make inner, if there are any; then counters says when they are done."""
    TYPE: tl.constexpr = uz.dtype.element_ty
    c = place * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < D
    x = uz + row * 2 * D
    inner += row * (RANK + 2 * N)
    r = tl.arange(0, BR)
    w = tl.load(dt_weight + c[:, None] * RANK + r[None, :], mask=mask[:, None] & (r < RANK)[None, :], other=0.0).to(tl.float32)
    n = tl.arange(0, BN)
    cell = c[:, None] * N + n[None, :]
    both = mask[:, None] & (n < N)[None, :]
    A = -tl.exp2(tl.load(A_log + cell, mask=both, other=0.0).to(tl.float32) * LOG2E)
    waited(counters, ARRIVALS, TOGETHER, EARLY)
    u = tl.load(x + c, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(x + D + c, mask=mask, other=0.0).to(tl.float32)
    at = h + row * D * N + cell
    old = tl.load(at, mask=both, other=0.0)
    delta = tl.load(inner + r, mask=r < RANK, other=0.0).to(tl.float32)
    dt = softplus(tl.sum(w * delta[None, :], 1) + tl.load(dt_bias + c, mask=mask, other=0.0).to(tl.float32), tl.float32)
    B = tl.load(inner + RANK + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(inner + RANK + N + n, mask=n < N, other=0.0).to(tl.float32)
    new = tl.exp2(dt[:, None] * A * LOG2E) * old + (dt * u)[:, None] * B[None, :]
    loaded()
    tl.store(at, new, mask=both)
    y = tl.sum(new * C[None, :], 1) + tl.load(skip + c, mask=mask, other=0.0).to(tl.float32) * u
    y = y.to(TYPE).to(tl.float32) * (z * sigmoid(z)).to(TYPE).to(tl.float32)
    tl.store(o + row * D + c, y.to(TYPE), mask=mask)


@triton.jit
def scan(
    uz, inner, dt_weight, dt_bias, A_log, skip, h, o, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`scanned`, of every channel of each row."""
    row = tl.program_id(1).to(tl.int64)
    scanned(
        tl.program_id(0), row, uz, inner, dt_weight, dt_bias, A_log, skip, h, o, h, D, RANK, N, CHANNELS, BR, BN, 0, False, EARLY
    )  # fmt: skip


@triton.jit
def scan_block(
    uz, chosen, inner, chosen_counters, dt_weight, dt_bias, A_log, skip, h, o, W, bias, residual, out, counters, gain, shift, normed,
    blocks, N, D: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, ALONG: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr, CHOOSING: tl.constexpr, CHOSEN_ROWS: tl.constexpr, CHOSEN_TALL: tl.constexpr, CHOSEN_DEEP: tl.constexpr,
    SEQUENCES: tl.constexpr, KIND: tl.constexpr, KIND_DOT: tl.constexpr, STEPS: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, NEXT: tl.constexpr, NEXT_EPS: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """By CHOOSING programs inner = uz[:, :D] chosenᵀ, by STEPS programs o (see `scanned`), by PROGRAMS out (see `finished`), each of which
    wait for those before them. chosen_counters [2]: arrived and left, 0 before and after."""
    INNER: tl.constexpr = RANK + 2 * STATES
    program = tl.program_id(0)
    if program < CHOOSING:
        if CHOSEN_TALL > 0:
            UP: tl.constexpr = (SEQUENCES + CHOSEN_TALL - 1) // CHOSEN_TALL
            m = (program % UP) * CHOSEN_TALL + tl.arange(0, CHOSEN_TALL)
            n = (program // UP) * CHOSEN_ROWS + tl.arange(0, CHOSEN_ROWS)
            ready(EARLY)
            y, _ = summed(uz, chosen, chosen, m, n, SEQUENCES, INNER, 2 * D, D, KIND, KIND_DOT, False, CHOSEN_DEEP)
            mask = (m < SEQUENCES)[:, None] & (n < INNER)[None, :]
            tl.store(inner + m.to(tl.int64)[:, None] * INNER + n[None, :], y.to(KIND), mask=mask)
        else:
            rows_multiplied(
                program, uz, chosen, chosen, uz, uz, uz, uz, uz, inner, uz, uz, uz, INNER, 2 * D, INNER, D, SEQUENCES, 0, 0.0, 0, False,
                False, 0, 1, False, KIND, EARLY, CHOSEN_ROWS, CHOSEN_DEEP,
            )  # fmt: skip
        done(chosen_counters, TOGETHER)
    elif program < CHOOSING + STEPS:
        place = (program - CHOOSING) % ALONG
        row = ((program - CHOOSING) // ALONG).to(tl.int64)
        scanned(
            place, row, uz, inner, dt_weight, dt_bias, A_log, skip, h, o, chosen_counters, D, RANK, STATES, CHANNELS, BR, BN, CHOOSING,
            TOGETHER, EARLY,
        )  # fmt: skip
        if PROGRAMS > 0:
            done(counters, TOGETHER)
        left(chosen_counters, STEPS, TOGETHER)
    else:
        finished(
            program - CHOOSING - STEPS, o, W, bias, residual, out, counters, gain, shift, normed, blocks, N, D, BATCH, STEPS, PROGRAMS,
            HAS_BIAS, HAS_RESIDUAL, ROWS, COLUMNS, TALL, SPLIT, DOT, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER, EARLY,
        )  # fmt: skip


@triton.jit
def whole_block(
    uz, taps, taps_bias, state, chosen, inner, counters, dt_weight, dt_bias, A_log, skip, h, o, D: tl.constexpr, TAPS: tl.constexpr,
    TAPS_BIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
    ALONG: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, SEQUENCES: tl.constexpr, CHOOSING: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr, DEEP: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A convolution of uz[:, :D] in place, BLOCKS programs a row; inner = uz[:, :D] chosenᵀ, by CHOOSING programs; and o (see `scanned`).
    Programs wait for those before them. counters [2]: 0 before, arrived of both after."""
    INNER: tl.constexpr = RANK + 2 * STATES
    CONVOLVING: tl.constexpr = SEQUENCES * BLOCKS
    program = tl.program_id(0)
    if program < CONVOLVING:
        c = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        ready(EARLY)
        row_convolved(uz, (program // BLOCKS).to(tl.int64), c, taps, taps_bias, state, 2 * D, D, TAPS, TAPS_BIAS)
        done(counters, TOGETHER)
    elif program < CONVOLVING + CHOOSING:
        UP: tl.constexpr = (SEQUENCES + TALL - 1) // TALL
        m = ((program - CONVOLVING) % UP) * TALL + tl.arange(0, TALL)
        n = ((program - CONVOLVING) // UP) * WIDE + tl.arange(0, WIDE)
        waited(counters, CONVOLVING, TOGETHER, EARLY)
        y, _ = summed(uz, chosen, chosen, m, n, SEQUENCES, INNER, 2 * D, D, KIND, DOT, False, DEEP)
        mask = (m < SEQUENCES)[:, None] & (n < INNER)[None, :]
        tl.store(inner + m.to(tl.int64)[:, None] * INNER + n[None, :], y.to(KIND), mask=mask)
        done(counters + 1, TOGETHER)
    else:
        place = (program - CONVOLVING - CHOOSING) % ALONG
        row = ((program - CONVOLVING - CHOOSING) // ALONG).to(tl.int64)
        scanned(
            place, row, uz, inner, dt_weight, dt_bias, A_log, skip, h, o, counters + 1, D, RANK, STATES, CHANNELS, BR, BN, CHOOSING,
            TOGETHER, EARLY,
        )  # fmt: skip


@triton.jit
def gated(
    ab, weight, conv_bias, state, o, W, bias, residual, out, counters, gain, shift, normed, blocks, N, D: tl.constexpr, TAPS: tl.constexpr,
    CONV_BIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, NEXT: tl.constexpr, NEXT_EPS: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """o [B, D] = SiLU(a) ∘ conv(b) of ab [B, 2·D]; state [B, TAPS − 1, D] moves on. out: see `finished`."""
    if PROGRAMS > 0 and tl.program_id(0) >= STEPS:
        finished(
            tl.program_id(0) - STEPS, o, W, bias, residual, out, counters, gain, shift, normed, blocks, N, D, BATCH, STEPS, PROGRAMS,
            HAS_BIAS, HAS_RESIDUAL, ROWS, COLUMNS, TALL, SPLIT, DOT, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER, EARLY,
        )  # fmt: skip
    else:
        row = (tl.program_id(0) // BLOCKS).to(tl.int64)
        TYPE: tl.constexpr = ab.dtype.element_ty
        c = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        mask = c < D
        b = ab + row * 2 * D + D
        ready(EARLY)
        state += row * (TAPS - 1) * D
        y = _convolved(b, weight, conv_bias, state, c, mask, D, TAPS, CONV_BIAS).to(TYPE).to(tl.float32)
        loaded()
        _moved(b, state, c, mask, D, TAPS)
        a = tl.load(ab + row * 2 * D + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(o + row * D + c, ((a * sigmoid(a)).to(TYPE).to(tl.float32) * y).to(TYPE), mask=mask)
        done(counters, TOGETHER)


@triton.jit
def diagonal(
    x, gain, shift, power, grown, C, skip, h, out, D: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr, BD: tl.constexpr,
    BP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, D] = GELU(S4D(LN(x))); h [B, D, P, 2] advances by e^{ΔA} (power) and (e^{ΔA} − 1)/A (grown), [D, P, 2]."""
    row = tl.program_id(1).to(tl.int64)
    TYPE: tl.constexpr = x.dtype.element_ty
    every = tl.arange(0, BD)
    ready(EARLY)
    given = tl.load(x + row * D + every, mask=every < D, other=0.0).to(tl.float32)
    mean = tl.sum(given, 0) / D
    centred = tl.where(every < D, given - mean, 0.0)
    rate = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + 1e-5)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < D
    u = (tl.load(x + row * D + c, mask=mask, other=0.0).to(tl.float32) - mean) * rate
    u = u * tl.load(gain + c, mask=mask, other=0.0).to(tl.float32) + tl.load(shift + c, mask=mask, other=0.0).to(tl.float32)
    u = u.to(TYPE).to(tl.float32)
    p = tl.arange(0, BP)
    both = mask[:, None] & (p < P)[None, :]
    cell = (c[:, None] * P + p[None, :]) * 2
    ar = tl.load(power + cell, mask=both, other=0.0)
    ai = tl.load(power + cell + 1, mask=both, other=0.0)
    at = h + row * D * P * 2 + cell
    hr = tl.load(at, mask=both, other=0.0)
    hi = tl.load(at + 1, mask=both, other=0.0)
    new_r = ar * hr - ai * hi + tl.load(grown + cell, mask=both, other=0.0) * u[:, None]
    new_i = ar * hi + ai * hr + tl.load(grown + cell + 1, mask=both, other=0.0) * u[:, None]
    loaded()
    tl.store(at, new_r, mask=both)
    tl.store(at + 1, new_i, mask=both)
    cr = tl.load(C + cell, mask=both, other=0.0).to(tl.float32)
    ci = tl.load(C + cell + 1, mask=both, other=0.0).to(tl.float32)
    y = 2 * tl.sum(cr * new_r - ci * new_i, 1) + tl.load(skip + c, mask=mask, other=0.0).to(tl.float32) * u
    tl.store(out + row * D + c, exact_gelu(y.to(TYPE).to(tl.float32)).to(TYPE), mask=mask)


def mamba_step(uz: Tensor, inner: Tensor, h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """uz [B, 2·D], inner [B, rank + 2·N]: δ, B and C, and h [B, D, N], which advances → y ∘ SiLU(z) [B, D]. p: the block's parameters by
    name."""
    batch, d, n = h.shape
    rank, o = p["dt_proj.weight"].shape[1], uz.new_empty((batch, d))
    channels = CHANNELS if batch < 8 else 64
    scan[(triton.cdiv(d, channels), batch)](
        uz, inner, p["dt_proj.weight"], p["dt_proj.bias"], p["A_log"], p["D"], h, o, D=d, RANK=rank, N=n, CHANNELS=channels,
        BR=triton.next_power_of_2(rank), BN=triton.next_power_of_2(n), num_warps=4, **launch(uz.device),
    )  # fmt: skip
    return o


def block_step(uz: Tensor, chosen: Tensor, counters: Tensor, h: Tensor, p: dict[str, Tensor], finish: Finish, x: Tensor | None) -> Tensor:
    """As `mamba_step`, in one launch with the product before it, chosen [rank + 2·N, D], and what `finish` makes of it, on x. counters [2]:
    zeros, before and after."""
    batch, d, n = h.shape
    rank, o = p["dt_proj.weight"].shape[1], uz.new_empty((batch, d))
    size, channels, few = len(chosen), CHANNELS if batch < 8 else 64, batch <= MOST
    shape = tiles.tile(batch, size, d, False, chosen.element_size())
    tall, rows, deep = (0, rows_of(size, d, False), triton.next_power_of_2(d)) if few else (16, 16, shape.deep)
    choosing = triton.cdiv(size, rows) * (triton.cdiv(batch, tall) if tall else 1)
    along = triton.cdiv(d, channels)
    programs, out, given = finish.launched(along * batch, o, x)
    given["TOGETHER"] = project.at_once()
    scan_block[(choosing + programs,)](
        uz, chosen, uz.new_empty((batch, size)), counters, p["dt_proj.weight"], p["dt_proj.bias"], p["A_log"], p["D"], h, o, D=d, RANK=rank,
        STATES=n, CHANNELS=channels, ALONG=along, BR=triton.next_power_of_2(rank), BN=triton.next_power_of_2(n), CHOOSING=choosing,
        CHOSEN_ROWS=rows, CHOSEN_TALL=tall, CHOSEN_DEEP=deep, SEQUENCES=batch, KIND=kind_of(chosen.dtype), KIND_DOT=dot_of(chosen.dtype),
        **given,
    )  # fmt: skip
    return finish.after(out, x)


def whole_step(uz: Tensor, conv: Tensor, chosen: Tensor, counters: Tensor, h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """As `mamba_step`, in one launch with the convolution of uz[:, :D] before it, whose state conv [B, w − 1, D] moves on, and the product
    with chosen [rank + 2·N, D]. counters [2]: zeros before, which a later launch makes them again."""
    batch, d, n = h.shape
    rank, size, o = p["dt_proj.weight"].shape[1], len(chosen), uz.new_empty((batch, d))
    taps, channels, block = p["conv1d.weight"], 64, min(512, triton.next_power_of_2(d))
    deep = max(16, min(128 // chosen.element_size() * 2, triton.next_power_of_2(d)))
    choosing, along, blocks = triton.cdiv(batch, 16) * triton.cdiv(size, 16), triton.cdiv(d, channels), triton.cdiv(d, block)
    whole_block[(batch * blocks + choosing + batch * along,)](
        uz, taps, p.get("conv1d.bias"), conv, chosen, uz.new_empty((batch, size)), counters, p["dt_proj.weight"], p["dt_proj.bias"],
        p["A_log"], p["D"], h, o, D=d, TAPS=taps.shape[-1], TAPS_BIAS="conv1d.bias" in p, BLOCK=block, BLOCKS=blocks, RANK=rank, STATES=n,
        CHANNELS=channels, ALONG=along, BR=triton.next_power_of_2(rank), BN=triton.next_power_of_2(n), SEQUENCES=batch, CHOOSING=choosing,
        TALL=16, WIDE=16, DEEP=deep, KIND=kind_of(chosen.dtype), DOT=dot_of(chosen.dtype), TOGETHER=project.at_once(), num_warps=4,
        **launch(uz.device),
    )  # fmt: skip
    return o


def conv_step(ab: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, finish: Finish, x: Tensor | None) -> Tensor:
    """ab [B, 2·D], state [B, w − 1, D], which moves on → what `finish` makes of SiLU(a) ∘ conv(b) [B, D], on x."""
    batch, d = len(ab), weight.shape[0]
    o, blocks = ab.new_empty((batch, d)), triton.cdiv(d, 128)
    programs, out, given = finish.launched(blocks * batch, o, x)
    gated[(programs,)](
        ab, weight, bias, state, o, D=d, TAPS=weight.shape[-1], CONV_BIAS=bias is not None, BLOCK=128, BLOCKS=blocks, **given
    )
    return finish.after(out, x)


def diagonal_step(x: Tensor, gain: Tensor, shift: Tensor, power: Tensor, grown: Tensor, C: Tensor, skip: Tensor, h: Tensor) -> Tensor:
    """x [B, D], h [B, D, P, 2], which advances → GELU of what S4D makes of LN(x) [B, D]."""
    batch, d, pairs, _ = h.shape
    out, channels = torch.empty_like(x), 8
    diagonal[(triton.cdiv(d, channels), batch)](
        x, gain, shift, power, grown, C, skip, h, out, D=d, P=pairs, CHANNELS=channels, BD=triton.next_power_of_2(d),
        BP=triton.next_power_of_2(pairs), num_warps=4, **launch(x.device),
    )  # fmt: skip
    return out
