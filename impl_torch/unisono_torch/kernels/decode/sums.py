"""One token of CRAM's sums, in place, each in one launch: the adaptive scheme's score s_φ and ξ ← λ ∘ ξ + w ∘ σ(u), as layers/cram.py and
layers/retained.py have it, and the fixed scheme's code, ξ and what of it goes into the layers."""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode import project
from unisono_torch.kernels.decode.common import NORMS, done, last, launch, left, loaded, normed, ready, waited
from unisono_torch.kernels.decode.tiles import Next, Norm
from unisono_torch.kernels.gelu import sigmoid
from unisono_torch.kernels.selective_scan.functions import softplus

EPS = tl.constexpr(1e-6)  # beside the sum of weights
ROWS = 16  # of the score's matrices, a program
Layer = tuple[Tensor, Tensor]  # weight [out, in] and bias


class Sum(NamedTuple):
    """A layer's score, sums and variants. xi, and z of normalised sums, [B, D] float32, are advanced; fade λ and rest 1 − λ [D] float32.

    channels: the score's last layer has a row a channel. skip: the norm that follows is added to u. given: the norm of what is read.
    """

    layers: tuple[Layer, Layer, Layer]
    key_scale: float
    xi: Tensor
    z: Tensor | None
    fade: Tensor | None
    rest: Tensor | None
    exclusive: bool
    channels: bool
    skip: bool
    given: Norm


@triton.jit
def _gelu_tanh(x):
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _advanced(
    u, s, c, mask, xi, z, fade, rest, out, EXCLUSIVE: tl.constexpr, FADES: tl.constexpr, NORMALISED: tl.constexpr
):  # fmt: skip
    """ξ of channels c of a row, which goes to out; its sums advance by the score s of u."""
    w = softplus(s, tl.float32) if NORMALISED else s
    before = tl.load(xi + c, mask=mask, other=0.0)
    weights = tl.load(z + c, mask=mask, other=0.0) if NORMALISED else before
    old = before
    if FADES:
        slow = tl.load(fade + c, mask=mask, other=0.0)
        old = slow * before
        weights = slow * weights
        if not NORMALISED:
            w = w * tl.load(rest + c, mask=mask, other=0.0)
    new = old + w * sigmoid(u)
    loaded()
    tl.store(xi + c, new, mask=mask)
    found = before if EXCLUSIVE else new
    if NORMALISED:
        weights += w
        tl.store(z + c, weights, mask=mask)
        found = new / (weights + EPS)
    tl.store(out + c, found, mask=mask)
    return found


@triton.jit
def _followed(
    found, u, d, D: tl.constexpr, gain, shift, following, NORM: tl.constexpr, NORM_EPS: tl.constexpr, SKIP: tl.constexpr
):  # fmt: skip
    """The norm of a row of ξ, with SKIP on u, in following."""
    TYPE: tl.constexpr = following.dtype.element_ty
    rows = normed(tl.where(d < D, found, 0.0), d, D, gain, shift, NORM, NORM_EPS, tl.float32 if SKIP else TYPE)
    if SKIP:
        rows += u
    tl.store(following + d, rows.to(TYPE), mask=d < D)


@triton.jit
def scored(
    x, qx, position, W0, b0, W1, b1, W2, b2, h, u, xi, z, fade, rest, out, counters, given_gain, given_shift, gain, shift, following,
    D: tl.constexpr, DIGITS: tl.constexpr, KEY_SCALE: tl.constexpr, EXCLUSIVE: tl.constexpr, CHANNELS: tl.constexpr, FADES: tl.constexpr,
    NORMALISED: tl.constexpr, SKIP: tl.constexpr, GIVEN: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    BI: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ξ [B, D] in out, whose sums advance by s = W2·h + b2. h [B, D]: s_φ's second hidden layer, float32, of the position's binary digits
    and k = u·qx / KEY_SCALE; u: x [B, D], or with GIVEN its norm, rounded as qx is.

    PROGRAMS for each sequence make rows of h; the last of them to come makes ξ, and the norm of it in following [B, D], if there is NORM.
    With CHANNELS as many more wait for h and make some channels of s and ξ each, the last of those its norm. counters [B, 3]: arrived and
    left, and the last's turns, 0 before and after.
    """
    row = tl.program_id(1)
    I: tl.constexpr = DIGITS + 1
    program = tl.program_id(0)
    d = tl.arange(0, BD)
    counters += row * 3
    at = row.to(tl.int64) * D
    if CHANNELS and program >= PROGRAMS:
        c = (program - PROGRAMS) * ROWS + tl.arange(0, ROWS)
        w = tl.load(W2 + c[:, None] * D + d[None, :], mask=(c < D)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        waited(counters, PROGRAMS, TOGETHER, EARLY)
        s = tl.sum(w * tl.load(h + at + d, mask=d < D, other=0.0)[None, :], 1) + tl.load(b2 + c, mask=c < D, other=0.0).to(tl.float32)
        own = tl.load(u + at + c, mask=c < D, other=0.0)
        _advanced(own, s, c, c < D, xi + at, z + at, fade, rest, out + at, EXCLUSIVE, FADES, NORMALISED)
        if NORM > 0 and last(counters + 2, PROGRAMS):
            tl.debug_barrier()
            given = tl.load(u + at + d, mask=d < D, other=0.0)
            found = tl.load(out + at + d, mask=d < D, other=0.0)
            _followed(found, given, d, D, gain, shift, following + at, NORM, NORM_EPS, SKIP)
        left(counters, PROGRAMS, TOGETHER)
    else:
        n = program * ROWS + tl.arange(0, ROWS)
        i = tl.arange(0, BI)
        j = tl.arange(0, BI)
        w1 = tl.load(W1 + n[:, None] * I + i[None, :], mask=(n < D)[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)
        w0 = tl.load(W0 + i[:, None] * I + j[None, :], mask=(i < I)[:, None] & (j < I)[None, :], other=0.0).to(tl.float32)
        ready(EARLY)
        given = tl.load(x + at + d, mask=d < D, other=0.0).to(tl.float32)
        given = normed(given, d, D, given_gain, given_shift, GIVEN, 0.0, qx.dtype.element_ty)
        key = tl.sum(given * tl.load(qx + at + d, mask=d < D, other=0.0).to(tl.float32), 0) / KEY_SCALE
        place = tl.load(position + row)
        digit = (place >> tl.maximum(DIGITS - 1 - j, 0)) & 1
        asked = tl.where(j < DIGITS, digit.to(tl.float32), tl.where(j == DIGITS, key, 0.0))
        first = _gelu_tanh(tl.sum(w0 * asked[None, :], 1) + tl.load(b0 + i, mask=i < I, other=0.0).to(tl.float32))
        second = _gelu_tanh(tl.sum(w1 * first[None, :], 1) + tl.load(b1 + n, mask=n < D, other=0.0).to(tl.float32))
        tl.store(h + at + n, second, mask=n < D)
        if CHANNELS:
            if program == 0:
                tl.store(u + at + d, given, mask=d < D)
            done(counters, TOGETHER)
        elif last(counters + 2, PROGRAMS):
            tl.debug_barrier()
            w = tl.load(W2 + d, mask=d < D, other=0.0).to(tl.float32)
            s = tl.sum(w * tl.load(h + at + d, mask=d < D, other=0.0), 0) + tl.load(b2).to(tl.float32)
            found = _advanced(given, s, d, d < D, xi + at, z + at, fade, rest, out + at, EXCLUSIVE, FADES, NORMALISED)
            if NORM > 0:
                _followed(found, given, d, D, gain, shift, following + at, NORM, NORM_EPS, SKIP)


@triton.jit
def coded(
    token, table, xi, W, bias, out, turns, D, C: tl.constexpr, DIGITS: tl.constexpr, FADE: tl.constexpr, REST: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, D] = W ξ + b, ξ [B, C] ← FADE ξ + REST σ(code), by PROGRAMS for each sequence. The code: DIGITS of token [B], or a row of the
    table [·, C]. turns [B]: 0 before and after."""
    row = tl.program_id(1)
    TYPE: tl.constexpr = out.dtype.element_ty
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BC)
    w = tl.load(W + n[:, None] * C + c[None, :], mask=(n < D)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    ready(EARLY)
    id = tl.load(token + row)
    if DIGITS > 0:
        code = ((id >> tl.maximum(DIGITS - 1 - c, 0)) & 1).to(tl.float32)
    else:
        code = tl.load(table + id.to(tl.int64) * C + c, mask=c < C, other=0.0).to(TYPE).to(tl.float32)
    code = sigmoid(code)
    old = tl.load(xi + row * C + c, mask=c < C, other=0.0)
    new = old + REST * (code - old) if FADE > 0.5 else FADE * old + REST * code  # as ops/decayed_sum.py
    new = tl.where(c < C, new, 0.0)
    y = tl.sum(w * new[None, :], 1) + tl.load(bias + n, mask=n < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + n, y.to(TYPE), mask=n < D)
    if last(turns + row, PROGRAMS):
        loaded()
        tl.store(xi + row * C + c, new, mask=c < C)


def sum_step(x: Tensor, qx: Tensor, position: Tensor, own: Sum, counters: Tensor, following: Next | None) -> Tensor:
    """x and qx = Q u [B, D], position [B] int32 → ξ [B, D] float32.

    counters [B, 3] int32: zeros, before and after. following: a norm of the result, with `skip` on u.
    """
    (batch, d), ((w0, b0), (w1, b1), (w2, b2)) = x.shape, own.layers
    h, out = (x.new_empty((batch, d), dtype=torch.float32) for _ in range(2))
    kind, gain, shift, eps = ("none", None, None, 0.0) if following is None else following.norm
    if following is not None:
        following.rows = torch.empty_like(x)
    programs, whole = triton.cdiv(d, ROWS), triton.next_power_of_2(d)
    scored[(programs * (1 + own.channels), batch)](
        x, qx, position, w0, b0, w1, b1, w2, b2, h, torch.empty_like(h) if own.channels else h, own.xi, own.xi if own.z is None else own.z,
        own.fade, own.rest, out, counters, own.given[1], own.given[2], gain, shift, None if following is None else following.rows, D=d,
        DIGITS=len(b0) - 1, KEY_SCALE=own.key_scale, EXCLUSIVE=own.exclusive, CHANNELS=own.channels, FADES=own.fade is not None,
        NORMALISED=own.z is not None, SKIP=own.skip, GIVEN=NORMS[own.given[0]], PROGRAMS=programs, ROWS=ROWS, BD=whole,
        BI=triton.next_power_of_2(len(b0)), NORM=NORMS[kind], NORM_EPS=eps, TOGETHER=project.at_once(), num_warps=4, **launch(x.device),
    )  # fmt: skip
    return out


def code_step(token: Tensor, table: Tensor | None, xi: Tensor, layer: Layer, decay: float, dtype: torch.dtype, turns: Tensor) -> Tensor:
    """token [B], ξ [B, code] float32, which is advanced → what `layer` makes of it [B, D] in dtype. table: codes [V, code], if they are
    not binary digits.

    turns [B] int32: zeros, before and after.
    """
    (batch, c), (weight, bias) = xi.shape, layer
    d = len(weight)
    out, rows = torch.empty((batch, d), dtype=dtype, device=xi.device), max(1, min(64, 8192 // triton.next_power_of_2(c)))
    programs = triton.cdiv(d, rows)
    coded[(programs, batch)](
        token, table, xi, weight, bias, out, turns, d, C=c, DIGITS=c if table is None else 0, FADE=decay, REST=1 - decay,
        PROGRAMS=programs, ROWS=rows, BC=triton.next_power_of_2(c), num_warps=4, **launch(xi.device),
    )  # fmt: skip
    return out
