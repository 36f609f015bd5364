"""Ops by LinearAttention, S_t = e^{g_t} S_{t−1} + k_t v_tᵀ, o_t = q_tᵀ S_t, and CausalConvWithState.

They are onnxruntime's own ("com.microsoft") before opset 27, which has both under the same names: builder.py renames the domain.
A token that is not valid has k = v = 0 and g = 0, and a reset has g = −10⁴, whose power of e is 0. What the operator must not meet is
NaN in a state that a reset shall forget; it is cleared where the first token of a call resets.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset

from unisono_onnx.ops.chunks import OWN
from unisono_onnx.ops.scans import ShortConv

MS = Opset("com.microsoft", 1)


@script(OWN)
def Where0(mark, x, axes):
    """x where `mark`, with `axes` added to it, else 0."""
    return op.Where(op.Unsqueeze(mark, axes), x, op.Constant(value_float=0.0))


@script(OWN)
def Fresh(reset, state):
    """The state [B, H, K, V], zeros where the first token resets."""
    keep = op.Not(op.Gather(reset, op.Constant(value_int=0), axis=1))
    return Where0(keep, state, op.Constant(value_ints=[1, 2, 3]))


@script(OWN)
def WithOnes(x):
    """[…, V] → […, V + 1], ones behind."""
    shape = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[1]), axis=0)
    return op.Concat(x, op.Expand(op.Constant(value_float=1.0), shape), axis=-1)


@script(OWN)
def Flattened(x):
    """[B, T, …] → [B, T, X]."""
    return op.Reshape(x, op.Constant(value_ints=[0, 0, -1]))


@script(OWN)
def Divided(rows):
    """[…, V + 1] → […, V], the first V columns divided by the last, plus ε."""
    zero, end, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[-1]), op.Constant(value_ints=[-1])
    top = op.Slice(rows, zero, end, axis)
    bottom = op.Gather(rows, op.Constant(value_ints=[-1]), axis=-1)
    return op.Div(top, op.Add(bottom, op.Constant(value_float=1e-6)))


@script(OWN)
def FusedLinearAttention(q, k, v, S_0, z_0, reset, valid, heads: int):
    """As LinearAttention. The normaliser is what is read of a column of ones behind v."""
    last, row = op.Constant(value_ints=[-1]), op.Constant(value_ints=[2, 3])
    key, value = Where0(valid, k, row), Where0(valid, WithOnes(v), row)
    forgets = op.Where(reset, op.Constant(value_float=-10000.0), op.Constant(value_float=0.0))  # [B, T]
    decay = op.Expand(op.Unsqueeze(forgets, op.Constant(value_ints=[2])), op.Shape(k, start=0, end=3))
    past = Fresh(reset, op.Concat(S_0, op.Unsqueeze(z_0, last), axis=-1))
    o, present = MS.LinearAttention(
        Flattened(q), Flattened(key), Flattened(value), past, decay,
        q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0,
    )  # fmt: skip
    rows = op.Reshape(o, op.Concat(op.Shape(k, start=0, end=3), last, axis=0))
    S_T = op.Slice(present, op.Constant(value_ints=[0]), last, last)
    z_T = op.Gather(present, op.Constant(value_int=-1), axis=-1)
    return Where0(valid, Divided(rows), row), S_T, z_T


@script(OWN)
def FusedMultiscale(q, k, v, log_decay, weight, S_0, z_0, reset, valid, heads: int):
    """As Multiscale where q and k are those of the normaliser, too. heads: M·H, all scales of all heads."""
    last, row, scale = op.Constant(value_ints=[-1]), op.Constant(value_ints=[2, 3]), op.Constant(value_ints=[2])
    ahead = op.Shape(q, start=0, end=2)
    each = op.Concat(ahead, op.Shape(z_0, start=1, end=3), op.Constant(value_ints=[1]), axis=0)  # [B, T, M, H, 1]
    query, key = op.Expand(op.Unsqueeze(q, scale), each), op.Expand(op.Unsqueeze(Where0(valid, k, row), scale), each)
    value = op.Expand(op.Unsqueeze(Where0(valid, WithOnes(v), row), scale), each)
    rate = op.Expand(op.Unsqueeze(log_decay, op.Constant(value_ints=[3, 4])), each)
    fades = Where0(valid, rate, op.Constant(value_ints=[2, 3, 4]))
    decay = op.Where(op.Unsqueeze(reset, op.Constant(value_ints=[2, 3, 4])), op.Constant(value_float=-10000.0), fades)
    whole = op.Concat(S_0, op.Unsqueeze(z_0, last), axis=-1)  # [B, M, H, K, V + 1]
    flat = op.Concat(op.Constant(value_ints=[0, -1]), op.Shape(whole, start=3), axis=0)
    o, present = MS.LinearAttention(
        Flattened(query), Flattened(key), Flattened(value), Fresh(reset, op.Reshape(whole, flat)), Flattened(decay),
        q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0,
    )  # fmt: skip
    rows = op.Reshape(o, op.Concat(ahead, op.Shape(z_0, start=1, end=3), last, axis=0))  # [B, T, M, H, V + 1]
    mixed = op.ReduceSum(op.Mul(weight, Divided(rows)), scale, keepdims=0)  # [B, T, H, V]
    state = op.Reshape(present, op.Shape(whole))
    S_T = op.Slice(state, op.Constant(value_ints=[0]), last, last)
    return Where0(valid, mixed, row), S_T, op.Gather(state, op.Constant(value_int=-1), axis=-1)


@script(OWN)
def FusedMultiscaleApart(q, k, v, q_norm, k_norm, log_decay, weight, S_0, z_0, reset, valid, heads: int):
    """As Multiscale: what is read, and its normaliser, each by its own q and k."""
    last, row, scale = op.Constant(value_ints=[-1]), op.Constant(value_ints=[2, 3]), op.Constant(value_ints=[2])
    ahead, one = op.Shape(q, start=0, end=2), op.Constant(value_ints=[1])
    each = op.Concat(ahead, op.Shape(z_0, start=1, end=3), one, axis=0)  # [B, T, M, H, 1]
    query, key = op.Expand(op.Unsqueeze(q, scale), each), op.Expand(op.Unsqueeze(Where0(valid, k, row), scale), each)
    query_norm, key_norm = op.Expand(op.Unsqueeze(q_norm, scale), each), op.Expand(op.Unsqueeze(Where0(valid, k_norm, row), scale), each)
    value = op.Expand(op.Unsqueeze(Where0(valid, v, row), scale), each)
    ones = op.Expand(op.Constant(value_float=1.0), each)
    rate = op.Expand(op.Unsqueeze(log_decay, op.Constant(value_ints=[3, 4])), each)
    fades = Where0(valid, rate, op.Constant(value_ints=[2, 3, 4]))
    decay = op.Where(op.Unsqueeze(reset, op.Constant(value_ints=[2, 3, 4])), op.Constant(value_float=-10000.0), fades)
    flat = op.Concat(op.Constant(value_ints=[0, -1]), op.Shape(S_0, start=3), axis=0)
    flat_norm = op.Concat(op.Constant(value_ints=[0, -1]), op.Shape(z_0, start=3), one, axis=0)
    top, S = MS.LinearAttention(
        Flattened(query), Flattened(key), Flattened(value), Fresh(reset, op.Reshape(S_0, flat)), Flattened(decay),
        q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0,
    )  # fmt: skip
    bottom, z = MS.LinearAttention(
        Flattened(query_norm), Flattened(key_norm), Flattened(ones), Fresh(reset, op.Reshape(z_0, flat_norm)), Flattened(decay),
        q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0,
    )  # fmt: skip
    rows = op.Reshape(top, op.Concat(ahead, op.Shape(z_0, start=1, end=3), last, axis=0))  # [B, T, M, H, V]
    norm = op.Add(op.Reshape(bottom, each), op.Constant(value_float=1e-6))
    mixed = op.ReduceSum(op.Mul(weight, op.Div(rows, norm)), scale, keepdims=0)
    return Where0(valid, mixed, row), op.Reshape(S, op.Shape(S_0)), op.Reshape(z, op.Shape(z_0))


@script(OWN)
def FusedShortConv(x, weight, state_0, reset, valid):
    """As ShortConv: by CausalConvWithState where nothing parts the tokens of this call."""
    first, end = op.Constant(value_ints=[1]), op.Constant(value_ints=[9223372036854775807])
    parted = op.ReduceSum(op.Cast(op.Slice(reset, first, end, first), to=7), keepdims=0)
    unread = op.ReduceSum(op.Cast(op.Not(valid), to=7), keepdims=0)
    if op.Equal(op.Add(parted, unread), op.Constant(value_int=0)):
        keep = op.Not(op.Gather(reset, op.Constant(value_int=0), axis=1))
        before = Where0(keep, state_0, op.Constant(value_ints=[1, 2]))
        taps = op.Unsqueeze(op.Transpose(weight, perm=[1, 0]), op.Constant(value_ints=[1]))
        channels = op.Transpose(x, perm=[0, 2, 1])
        rows, after = MS.CausalConvWithState(channels, taps, None, op.Transpose(before, perm=[0, 2, 1]), activation="none")
        # casts to what they are: onnx cannot tell the types of onnxruntime's own operator
        y = op.Cast(op.Transpose(rows, perm=[0, 2, 1]), to=1)
        state = op.Cast(op.Transpose(after, perm=[0, 2, 1]), to=1)
    else:
        y, state = ShortConv(x, weight, state_0, reset, valid)
    return y, state


@script(OWN)
def FusedSelectiveScan(u, dt, A, B, C, D, h_0, reset, valid, heads: int):
    """As SelectiveScan: a head a channel, keys as wide as its state, values of width 1."""
    last, state, row = op.Constant(value_ints=[-1]), op.Constant(value_ints=[2]), op.Constant(value_ints=[2])
    drive, step = Where0(valid, u, row), Where0(valid, dt, row)
    each = op.Concat(op.Shape(u), op.Constant(value_ints=[1]), axis=0)  # [B, T, D, 1]
    key = op.Expand(op.Unsqueeze(Where0(valid, B, row), state), each)
    query = op.Expand(op.Unsqueeze(Where0(valid, C, row), state), each)
    fades = op.Mul(op.Unsqueeze(step, last), A)
    decay = op.Where(op.Unsqueeze(reset, op.Constant(value_ints=[2, 3])), op.Constant(value_float=-10000.0), fades)
    o, present = MS.LinearAttention(
        Flattened(query), Flattened(key), op.Mul(step, drive), Fresh(reset, op.Unsqueeze(h_0, last)), Flattened(decay),
        q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0,
    )  # fmt: skip
    return op.Add(o, op.Mul(D, drive)), op.Squeeze(present, last)
