"""Linear attention, attention at several time scales, and softmax attention, as ONNX functions; in the terms of chunks.py."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from onnxscript import graph, script
from onnxscript import opset21 as op

from unisono_onnx.ops.chunks import (
    OWN,
    Chunks,
    Count,
    Counted,
    Flat,
    Heads,
    LastRow,
    Masked,
    Newest,
    Numbers,
    Output,
    Own,
    Reads,
    SlotNumbers,
)


@script(OWN)
def LinearAttention(q, k, v, S_0, z_0, reset, valid):
    """φ(q), φ(k) [B, T, H, K], v [B, T, H, V], S [B, H, K, V], z [B, H, K] → o [B, T, H, V], S, z."""
    resets, valids = Chunks(Numbers(reset)), Chunks(Numbers(valid))

    @graph()
    def chunk(S, z, q_n, k_n, v_n, reset_n, valid_n):
        zero = op.Constant(value_float=0.0)
        reads, kept = Reads(reset_n, valid_n)
        heads = op.Shape(z, start=1, end=2)
        query, key, value = Heads(q_n, heads), Heads(k_n, heads), Heads(Masked(v_n, valid_n), heads)
        head, last = op.Constant(value_ints=[1]), op.Constant(value_ints=[-1])
        still = op.Unsqueeze(kept, head)  # [B, 1, C, 1]
        scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
        scores = op.Where(op.Unsqueeze(reads, head), scores, zero)
        top = op.Add(op.MatMul(scores, value), op.Where(still, op.MatMul(query, S), zero))
        carried = op.Where(still, op.MatMul(query, op.Unsqueeze(z, last)), zero)
        bottom = op.Add(op.ReduceSum(scores, last), carried)
        o = Flat(op.Div(top, op.Add(bottom, op.Constant(value_float=1e-6))))
        ends = op.Unsqueeze(LastRow(reads), op.Constant(value_ints=[1, 3]))  # [B, 1, C, 1]
        adds = op.Where(ends, key, zero)
        stays = LastRow(kept)  # [B, 1]
        S_kept = op.Where(op.Unsqueeze(stays, op.Constant(value_ints=[2, 3])), S, zero)
        S_next = op.Add(S_kept, op.MatMul(op.Transpose(adds, perm=[0, 1, 3, 2]), value))
        z_kept = op.Where(op.Unsqueeze(stays, op.Constant(value_ints=[2])), z, zero)
        z_next = op.Add(z_kept, op.ReduceSum(adds, op.Constant(value_ints=[2]), keepdims=0))
        return S_next, z_next, o

    S_T, z_T, o = op.Scan(S_0, z_0, Chunks(q), Chunks(k), Chunks(v), resets, valids, body=chunk, num_scan_inputs=5)
    return Output(o, v, valid), S_T, z_T


@script(OWN)
def Multiscale(q, k, v, q_norm, k_norm, log_decay, weight, S_0, z_0, reset, valid):
    """log_decay [B or 1, T or 1, M], weight [B, T, M, H or 1, V or 1], S [B, M, H, K, V], z [B, M, H, K], else as LinearAttention."""
    resets, valids = Chunks(Numbers(reset)), Chunks(Numbers(valid))

    @graph()
    def chunk(S, z, q_n, k_n, v_n, q_norm_n, k_norm_n, log_decay_n, weight_n, reset_n, valid_n):
        zero = op.Constant(value_float=0.0)
        first, second, third = op.Constant(value_ints=[1]), op.Constant(value_ints=[2]), op.Constant(value_ints=[3])
        end = op.Constant(value_ints=[-1])
        reads, kept = Reads(reset_n, valid_n)
        scales, heads = op.Shape(z, start=1, end=2), op.Shape(z, start=2, end=3)
        query, key = op.Unsqueeze(Heads(q_n, heads), first), op.Unsqueeze(Heads(Masked(k_n, valid_n), heads), first)  # [B, 1, H, C, K]
        query_norm = op.Unsqueeze(Heads(q_norm_n, heads), first)
        key_norm = op.Unsqueeze(Heads(Masked(k_norm_n, valid_n), heads), first)
        value = op.Unsqueeze(Heads(Masked(v_n, valid_n), heads), first)
        # sums of log λ in float64: one hard decay would leave the soft ones after it no digits
        fallen = op.CumSum(op.Cast(Masked(log_decay_n, valid_n), to=11), op.Constant(value_int=1))
        total = op.Transpose(fallen, perm=[0, 2, 1])  # [B, M, C]
        gap = op.Cast(op.Sub(op.Unsqueeze(total, third), op.Unsqueeze(total, second)), to=1)  # [B, M, C, C]
        unread = op.Constant(value_float=float("-inf"))
        decay = op.Exp(op.Where(op.Unsqueeze(reads, first), gap, unread))
        still = op.Unsqueeze(kept, op.Constant(value_ints=[1, 2]))  # [B, 1, 1, C, 1]
        fade = op.Unsqueeze(op.Exp(op.Cast(total, to=1)), op.Constant(value_ints=[2, 4]))  # [B, M, 1, C, 1]
        each = op.Unsqueeze(decay, second)  # [B, M, 1, C, C]
        weights = op.Mul(each, op.MatMul(query, op.Transpose(key, perm=[0, 1, 2, 4, 3])))
        norms = op.Mul(each, op.MatMul(query_norm, op.Transpose(key_norm, perm=[0, 1, 2, 4, 3])))
        top = op.Add(op.MatMul(weights, value), op.Where(still, op.Mul(fade, op.MatMul(query, S)), zero))
        carried = op.Where(still, op.Mul(fade, op.MatMul(query_norm, op.Unsqueeze(z, end))), zero)
        bottom = op.Add(op.ReduceSum(norms, end), carried)
        read = op.Div(top, op.Add(bottom, op.Constant(value_float=1e-6)))  # [B, M, H, C, V]
        row = op.Reshape(op.Transpose(read, perm=[0, 1, 3, 2, 4]), op.Constant(value_ints=[0, 0, 0, -1]))
        share = op.Concat(op.Constant(value_ints=[0, 0]), scales, op.Constant(value_ints=[-1]), axis=0)
        share = op.Transpose(op.Reshape(weight_n, share), perm=[0, 2, 1, 3])  # [B, M, C, 1 or H·V]
        o = op.ReduceSum(op.Mul(share, row), first, keepdims=0)
        ahead = op.Gather(decay, op.Constant(value_int=-1), axis=2)  # [B, M, C]
        ahead = op.Unsqueeze(ahead, op.Constant(value_ints=[2, 4]))  # [B, M, 1, C, 1]
        stays = op.Unsqueeze(LastRow(kept), op.Constant(value_ints=[2, 3]))  # [B, 1, 1, 1]
        left = op.Gather(fade, op.Constant(value_int=-1), axis=3)  # [B, M, 1, 1]
        adds, adds_norm = op.Mul(ahead, key), op.Mul(ahead, key_norm)  # [B, M, H, C, K]
        S_kept = op.Where(op.Unsqueeze(stays, end), op.Mul(op.Unsqueeze(left, end), S), zero)
        S_next = op.Add(S_kept, op.MatMul(op.Transpose(adds, perm=[0, 1, 2, 4, 3]), value))
        z_next = op.Add(op.Where(stays, op.Mul(left, z), zero), op.ReduceSum(adds_norm, third, keepdims=0))
        return S_next, z_next, o

    each = op.Concat(op.Shape(q, start=0, end=2), op.Shape(log_decay, start=2), axis=0)
    decays = Chunks(op.Expand(log_decay, each))
    S_T, z_T, o = op.Scan(
        S_0, z_0, Chunks(q), Chunks(k), Chunks(v), Chunks(q_norm), Chunks(k_norm), decays, Chunks(weight), resets, valids,
        body=chunk, num_scan_inputs=9,
    )  # fmt: skip
    return Output(o, v, valid), S_T, z_T


@script(OWN)
def Attend(q, keys, values, reads, heads):
    """Softmax attention: q [B, C, H·K], keys [B, J, H·K], values [B, J, H·V], reads [B, C, J] → [B, C, H·V]."""
    query = Heads(q, heads)
    scale = op.Sqrt(op.Cast(op.Shape(query, start=3, end=4), to=1))
    scores = op.MatMul(op.Div(query, scale), op.Transpose(Heads(keys, heads), perm=[0, 1, 3, 2]))
    unread = op.Constant(value_float=float("-inf"))
    share = op.Softmax(op.Where(op.Unsqueeze(reads, op.Constant(value_ints=[1])), scores, unread), axis=-1)
    return Flat(op.MatMul(share, Heads(values, heads)))


@script(OWN)
def Window(q, k, v, keys_0, values_0, count_0, reset, valid):
    """q, k [B, T, H, K], v [B, T, H, V], keys and values [B, w, H, ·], newest last, count [B] int32 → o [B, T, H, V], the state."""
    resets, valids = Chunks(Numbers(reset)), Chunks(Numbers(valid))
    heads = op.Shape(keys_0, start=2, end=3)
    flat = op.Constant(value_ints=[0, 0, -1])
    start = op.Unsqueeze(op.Cast(count_0, to=7), op.Constant(value_ints=[1]))

    @graph()
    def chunk(keys, values, count, q_n, k_n, v_n, reset_n, valid_n):
        zero, middle = op.Constant(value_float=0.0), op.Constant(value_ints=[1])
        reads, kept = Reads(reset_n, valid_n)
        n = Count(valid_n)  # [B, C, 1]
        place = SlotNumbers(keys)  # [w]
        filled = op.Greater(place, op.Neg(op.Cast(count, to=1)))  # [B, w]
        whole = op.Cast(op.Shape(keys, start=1, end=2), to=1)
        recent = op.And(op.Less(op.Sub(n, place), whole), op.Unsqueeze(filled, middle))
        old_reads = op.And(recent, kept)  # [B, C, w]
        near = op.Less(op.Sub(n, op.Transpose(n, perm=[0, 2, 1])), whole)
        new_reads = op.Or(op.And(reads, near), Own(reads))
        there = op.And(filled, op.Squeeze(op.Gather(kept, op.Constant(value_ints=[0]), axis=1), op.Constant(value_ints=[2])))
        there = op.Unsqueeze(there, op.Constant(value_ints=[2]))  # [B, w, 1]
        old_k, old_v = op.Where(there, keys, zero), op.Where(there, values, zero)
        new_k, new_v = Masked(k_n, valid_n), Masked(v_n, valid_n)
        seen = op.Concat(old_reads, new_reads, axis=2)
        o = Attend(q_n, op.Concat(old_k, new_k, axis=1), op.Concat(old_v, new_v, axis=1), seen, heads)
        k_next, v_next = Newest(old_k, new_k, reads, kept, n), Newest(old_v, new_v, reads, kept, n)
        return k_next, v_next, Counted(count, reads, kept), o

    k_T, v_T, count_T, o = op.Scan(
        op.Reshape(keys_0, flat), op.Reshape(values_0, flat), start, Chunks(q), Chunks(k), Chunks(v), resets, valids,
        body=chunk, num_scan_inputs=5,
    )  # fmt: skip
    count = op.Cast(op.Squeeze(count_T, op.Constant(value_ints=[1])), to=6)
    return Output(o, v, valid), op.Reshape(k_T, op.Shape(keys_0)), op.Reshape(v_T, op.Shape(values_0)), count


@script(OWN)
def SoftmaxAttention(q, k, v, keys_0, values_0, count_0, reset, valid):
    """q, k [B, T, H, K], v [B, T, H, V], keys and values [B, capacity, H, ·] by position, count [B] int32 → o [B, T, H, V], the state.

    Tokens past the capacity are not kept.
    """
    resets, valids = Chunks(Numbers(reset)), Chunks(Numbers(valid))
    heads = op.Shape(keys_0, start=2, end=3)
    flat = op.Constant(value_ints=[0, 0, -1])
    start = op.Unsqueeze(op.Cast(count_0, to=7), op.Constant(value_ints=[1]))
    capacity = op.Squeeze(op.Shape(keys_0, start=1, end=2))
    slots = op.Range(op.Constant(value_int=0), capacity, op.Constant(value_int=1))

    @graph()
    def chunk(keys, values, count, q_n, k_n, v_n, reset_n, valid_n):
        zero, middle, last = op.Constant(value_float=0.0), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
        reads, kept = Reads(reset_n, valid_n)
        filled = op.Less(slots, count)  # [B, capacity]
        old_reads = op.And(op.Unsqueeze(filled, middle), kept)  # [B, C, capacity]
        new_reads = op.Or(reads, Own(reads))
        first = op.Squeeze(op.Gather(kept, op.Constant(value_ints=[0]), axis=1), last)
        there = op.Unsqueeze(op.And(filled, first), last)
        old_k, old_v = op.Where(there, keys, zero), op.Where(there, values, zero)
        new_k, new_v = Masked(k_n, valid_n), Masked(v_n, valid_n)
        seen = op.Concat(old_reads, new_reads, axis=2)
        o = Attend(q_n, op.Concat(old_k, new_k, axis=1), op.Concat(old_v, new_v, axis=1), seen, heads)
        # the slot of each token: how many tokens of its sequence came before
        before = op.Where(op.Squeeze(kept, last), count, op.Constant(value_int=0))  # [B, C]
        slot = op.Sub(op.Add(before, op.ReduceSum(op.Cast(reads, to=7), last, keepdims=0)), op.Constant(value_int=1))
        mine = op.Equal(op.Unsqueeze(slot, middle), op.Unsqueeze(slots, middle))
        mine = op.Cast(op.And(mine, op.Unsqueeze(LastRow(reads), middle)), to=1)  # [B, capacity, C]
        empty = op.Less(op.ReduceSum(mine, last), op.Constant(value_float=0.5))  # [B, capacity, 1]
        stays = op.And(empty, op.Unsqueeze(LastRow(kept), last))
        k_next = op.Add(op.Where(stays, old_k, zero), op.MatMul(mine, new_k))
        v_next = op.Add(op.Where(stays, old_v, zero), op.MatMul(mine, new_v))
        return k_next, v_next, Counted(count, reads, kept), o

    k_T, v_T, count_T, o = op.Scan(
        op.Reshape(keys_0, flat), op.Reshape(values_0, flat), start, Chunks(q), Chunks(k), Chunks(v), resets, valids,
        body=chunk, num_scan_inputs=5,
    )  # fmt: skip
    count = op.Cast(op.Squeeze(count_T, op.Constant(value_ints=[1])), to=6)
    return Output(o, v, valid), op.Reshape(k_T, op.Shape(keys_0)), op.Reshape(v_T, op.Shape(values_0)), count
