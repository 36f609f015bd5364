"""One pass each way over queries and keys: RoPE and a feature map φ, before or after it, in float32 between a load and a store.

A row is a token's head. Entries i and i + K/2 turn together, so that a row lies as two tiles of K/2 columns.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _phi(x, tau, MAP: tl.constexpr):
    """φ(x). A GPU's greater of two numbers is the one that is no NaN: hence `where`."""
    if MAP == "relu":
        return tl.where(x < 0, 0.0, x)
    if MAP == "learned":
        x *= tau
    if MAP == "elu1" or MAP == "learned":
        return tl.where(x > 0, x + 1, tl.exp2(tl.where(x > 0, 0.0, x) * LOG2E))
    return x


@triton.jit
def _slope(x, tau, MAP: tl.constexpr):
    """φ'(x), of learned by τx."""
    if MAP == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    if MAP == "learned":
        x *= tau
    if MAP == "elu1" or MAP == "learned":
        return tl.where(x <= 0, tl.exp2(tl.minimum(x, 0.0) * LOG2E), 1.0)  # 1 of a NaN: its gradient is 0
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _load(base, at, mask, HALF: tl.constexpr):
    return tl.load(base + at, mask=mask, other=0.0).to(tl.float32), tl.load(base + at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(base, at, mask, x, y, HALF: tl.constexpr):
    tl.store(base + at, x.to(base.dtype.element_ty), mask=mask)
    tl.store(base + at + HALF, y.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _there(x, out, before, at, put, mask, c, s, tau, HALF: tl.constexpr, MAP: tl.constexpr, NUMERATOR: tl.constexpr):
    """before: where φ(x) goes, of which `out` is the turned one."""
    x1, x2 = _load(x, at, mask, HALF)
    if NUMERATOR:
        x1, x2 = _phi(x1, tau, MAP), _phi(x2, tau, MAP)
        _store(before, put, mask, x1, x2, HALF)
        _store(out, put, mask, x1 * c - x2 * s, x1 * s + x2 * c, HALF)
    else:
        _store(out, put, mask, _phi(x1 * c - x2 * s, tau, MAP), _phi(x1 * s + x2 * c, tau, MAP), HALF)


@triton.jit
def _back(x, dy, dbefore, dx, at, put, to, mask, c, s, tau, HALF: tl.constexpr, MAP: tl.constexpr, NUMERATOR: tl.constexpr):
    """dx, at `to`; returns what τ's gradient sums."""
    y1, y2 = _load(dy, put, mask, HALF)
    part = tl.zeros(y1.shape, tl.float32)
    if MAP != "none":
        x1, x2 = _load(x, at, mask, HALF)
    if NUMERATOR:
        b1, b2 = _load(dbefore, put, mask, HALF)
        y1, y2 = y1 * c + y2 * s + b1, y2 * c - y1 * s + b2
    elif MAP != "none":
        x1, x2 = x1 * c - x2 * s, x1 * s + x2 * c
    if MAP != "none":
        y1, y2 = y1 * _slope(x1, tau, MAP), y2 * _slope(x2, tau, MAP)
        if MAP == "learned":
            part = tl.where(y1 == 0, 0.0, y1 * x1) + tl.where(y2 == 0, 0.0, y2 * x2)  # a NaN of padding must not spread
            y1, y2 = y1 * tau, y2 * tau
    if not NUMERATOR:
        y1, y2 = y1 * c + y2 * s, y2 * c - y1 * s
    _store(dx, to, mask, y1, y2, HALF)
    return part


@triton.jit
def _rows(cos, sin, T, blocks, SHARED: tl.constexpr, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: batch, tokens, heads, where its rows go in a contiguous array, what is there, and their turns."""
    HALF: tl.constexpr = K // 2
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token, head = row // H, row % H
    mask = (row < T.to(tl.int64) * H)[:, None] & (column < HALF)[None, :]
    turn = (token if SHARED else batch * T + token)[:, None] * HALF + column[None, :]
    c, s = tl.load(cos + turn, mask=mask, other=0.0), tl.load(sin + turn, mask=mask, other=0.0)
    put = (batch * T * H + row)[:, None] * K + column[None, :]
    return batch, token, head, column, put, mask, c, s


@triton.jit(do_not_specialize=["T", "blocks", "q0", "q1", "q2", "k0", "k1", "k2"])
def forward(
    q, k, cos, sin, tau, q_out, k_out, q_before, k_before, T, blocks, q0, q1, q2, k0, k1, k2, UNIT: tl.constexpr,
    SHARED: tl.constexpr, H: tl.constexpr, K: tl.constexpr, MAP: tl.constexpr, NUMERATOR: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """q, k [B, T, H, K] by strides that count UNITs, cos, sin [B or 1, T, K/2] → four arrays, contiguous."""
    HALF: tl.constexpr = K // 2
    batch, token, head, column, put, mask, c, s = _rows(cos, sin, T, blocks, SHARED, H, K, ROWS, BLOCK)
    t = tl.load(tau).to(tl.float32) if MAP == "learned" else 1.0
    at = (batch * q0 + token * q1 + head * q2)[:, None] * UNIT + column[None, :]
    _there(q, q_out, q_before, at, put, mask, c, s, t, HALF, MAP, NUMERATOR)
    at = (batch * k0 + token * k1 + head * k2)[:, None] * UNIT + column[None, :]
    _there(k, k_out, k_before, at, put, mask, c, s, t, HALF, MAP, NUMERATOR)


@triton.jit(do_not_specialize=["T", "blocks", "q0", "q1", "q2", "k0", "k1", "k2", "d0", "d1", "d2"])
def backward(
    q, k, cos, sin, tau, dq_out, dk_out, dq_before, dk_before, dq, dk, dtau, T, blocks, q0, q1, q2, k0, k1, k2, d0, d1, d2,
    UNIT: tl.constexpr, SHARED: tl.constexpr, H: tl.constexpr, K: tl.constexpr, MAP: tl.constexpr, NUMERATOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the four, contiguous → of q and k, by strides, and of τ a sum a program."""
    HALF: tl.constexpr = K // 2
    batch, token, head, column, put, mask, c, s = _rows(cos, sin, T, blocks, SHARED, H, K, ROWS, BLOCK)
    t = tl.load(tau).to(tl.float32) if MAP == "learned" else 1.0
    to = (batch * d0 + token * d1 + head * d2)[:, None] * UNIT + column[None, :]
    at = (batch * q0 + token * q1 + head * q2)[:, None] * UNIT + column[None, :]
    part = _back(q, dq_out, dq_before, dq, at, put, to, mask, c, s, t, HALF, MAP, NUMERATOR)
    at = (batch * k0 + token * k1 + head * k2)[:, None] * UNIT + column[None, :]
    part += _back(k, dk_out, dk_before, dk, at, put, to, mask, c, s, t, HALF, MAP, NUMERATOR)
    if MAP == "learned":
        tl.store(dtau + tl.program_id(0), tl.sum(tl.sum(part, 1), 0))
