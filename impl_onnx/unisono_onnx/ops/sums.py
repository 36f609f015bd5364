"""CRAM's sums and the positions of tokens as ONNX functions; in the terms of chunks.py."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from onnxscript import graph, script
from onnxscript import opset21 as op

from unisono_onnx.ops.chunks import OWN, Chunks, Count, Counted, Joined, LastRow, Masked, Numbers, Own, Reads
from unisono_onnx.ops.elementwise import Logistic


@script(OWN)
def DecayedSum(x, xi_0, reset, valid, rate: float, gain: float):
    """ξ_t = Σ_{j≤t} (1−λ) λ^{n_t−n_j} σ(x_j) + λ^{n_t} ξ_{−1}: x [B, T, D], ξ [B, D]; rate is log λ, gain 1−λ."""
    log, scale = op.Constant(value_float=rate), op.Constant(value_float=gain)

    @graph()
    def chunk(xi, x_n, reset_n, valid_n):
        zero = op.Constant(value_float=0.0)
        reads, kept = Reads(reset_n, valid_n)
        n = Count(valid_n)  # [B, C, 1]
        gap = op.Where(reads, op.Sub(n, op.Transpose(n, perm=[0, 2, 1])), zero)
        weight = op.Where(reads, op.Exp(op.Mul(gap, log)), zero)
        inner = op.MatMul(weight, Masked(op.Mul(Logistic(x_n), scale), valid_n))
        before = op.Mul(op.Exp(op.Mul(n, log)), op.Unsqueeze(xi, op.Constant(value_ints=[1])))
        y = op.Add(inner, op.Where(kept, before, zero))
        return LastRow(y), y

    xi_T, y = op.Scan(xi_0, Chunks(x), Chunks(Numbers(reset)), Chunks(Numbers(valid)), body=chunk, num_scan_inputs=3)
    return Joined(y, x), xi_T


@script(OWN)
def WeightedSum(x, s, xi_0, reset, valid, exclusive: int):
    """ξ_t = ξ_{−1} + Σ_{j≤t} s_j σ(x_j), or j<t if exclusive: x [B, T, D], s [B, T], ξ [B, D]."""
    inclusive = op.Equal(op.Constant(value_int=exclusive), op.Constant(value_int=0))

    @graph()
    def chunk(xi, x_n, s_n, reset_n, valid_n):
        reads, kept = Reads(reset_n, valid_n)
        term = Masked(op.Mul(s_n, Logistic(x_n)), valid_n)
        before = op.Where(kept, op.Unsqueeze(xi, op.Constant(value_ints=[1])), op.Constant(value_float=0.0))
        y = op.Add(op.MatMul(Numbers(op.And(reads, op.Or(inclusive, op.Not(Own(reads))))), term), before)
        end = op.Unsqueeze(LastRow(reads), op.Constant(value_ints=[1]))  # [B, 1, C]
        xi_next = op.Add(op.Squeeze(op.MatMul(Numbers(end), term), op.Constant(value_ints=[1])), LastRow(before))
        return xi_next, y

    resets, valids = Chunks(Numbers(reset)), Chunks(Numbers(valid))
    xi_T, y = op.Scan(xi_0, Chunks(x), Chunks(s), resets, valids, body=chunk, num_scan_inputs=4)
    return Joined(y, x), xi_T


@script(OWN)
def Position(count_0, reset, valid):
    """How many valid tokens its sequence held before each one [B, T] int32, and after the last: count [B] int32."""
    one, last = op.Constant(value_ints=[1]), op.Constant(value_ints=[2])

    @graph()
    def chunk(count, reset_n, valid_n):
        reads, kept = Reads(reset_n, valid_n)
        earlier = op.And(reads, op.Not(Own(reads)))
        carried = op.Where(kept, op.Unsqueeze(count, op.Constant(value_ints=[1])), op.Constant(value_int=0))  # [B, C, 1]
        where = op.Add(carried, op.ReduceSum(op.Cast(earlier, to=7), op.Constant(value_ints=[2])))
        return Counted(count, reads, kept), where

    start = op.Unsqueeze(op.Cast(count_0, to=7), one)
    count_T, where = op.Scan(start, Chunks(Numbers(reset)), Chunks(Numbers(valid)), body=chunk, num_scan_inputs=2)
    return op.Cast(op.Squeeze(Joined(where, reset), last), to=6), op.Cast(op.Squeeze(count_T, one), to=6)
