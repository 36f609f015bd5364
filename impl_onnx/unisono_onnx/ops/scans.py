"""The causal convolution (in the terms of chunks.py), state spaces and MARU's cell (token by token) as ONNX functions."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from onnxscript import graph, script
from onnxscript import opset21 as op

from unisono_onnx.ops.chunks import OWN, Chunks, Count, Joined, Masked, Newest, Numbers, Reads, SlotNumbers
from unisono_onnx.ops.elementwise import Logistic


@script(OWN)
def ShortConv(x, weight, state_0, reset, valid):
    """x [B, T, D], weight [w, D] (the last tap is the token's own), state [B, w−1, D] → y [B, T, D], state."""
    resets, valids = Chunks(Numbers(reset)), Chunks(Numbers(valid))
    taps = op.Squeeze(op.Shape(weight, start=0, end=1))
    lags = op.Sub(op.Range(taps, op.Constant(value_int=0), op.Constant(value_int=-1)), op.Constant(value_int=1))
    lags = op.Unsqueeze(op.Cast(lags, to=1), op.Constant(value_ints=[1]))  # [w, 1]

    @graph()
    def chunk(state, x_n, reset_n, valid_n):
        middle = op.Constant(value_ints=[1])
        reads, kept = Reads(reset_n, valid_n)
        n = Count(valid_n)  # [B, C, 1]
        new = Masked(x_n, valid_n)
        old = op.Where(op.Gather(kept, op.Constant(value_ints=[0]), axis=1), state, op.Constant(value_float=0.0))
        old_lag = op.Sub(n, SlotNumbers(state))  # [B, C, w−1]
        new_lag = op.Sub(n, op.Transpose(n, perm=[0, 2, 1]))  # [B, C, C]
        hit = op.And(op.Equal(op.Unsqueeze(new_lag, op.Constant(value_ints=[2])), lags), op.Unsqueeze(reads, op.Constant(value_ints=[2])))
        old_hit = op.And(
            op.Equal(op.Unsqueeze(old_lag, op.Constant(value_ints=[2])), lags), op.Unsqueeze(kept, op.Constant(value_ints=[2]))
        )
        takes = op.Cast(op.Concat(old_hit, hit, axis=3), to=1)  # [B, C, w, w−1+C]
        seen = op.Unsqueeze(op.Concat(old, new, axis=1), middle)  # [B, 1, w−1+C, D]
        y = op.ReduceSum(op.Mul(op.MatMul(takes, seen), weight), op.Constant(value_ints=[2]), keepdims=0)
        return Newest(state, new, reads, kept, n), y

    state_T, y = op.Scan(state_0, Chunks(x), resets, valids, body=chunk, num_scan_inputs=3)
    return Joined(y, x), state_T


@script(OWN)
def Steps(x):
    """[B, T, X] → [T, B, X], marks [B, T] → [T, B, 1]."""
    return op.Transpose(op.Reshape(x, op.Constant(value_ints=[0, 0, -1])), perm=[1, 0, 2])


@script(OWN)
def SelectiveScan(u, dt, A, B, C, D, h_0, reset, valid):
    """u, dt [B, T, D], A [D, N], B, C [B, T, N], D [D], h [B, D, N] → y [B, T, D], h."""
    here = op.Unsqueeze(valid, op.Constant(value_ints=[2]))
    zero = op.Constant(value_float=0.0)
    drive, step = op.Where(here, u, zero), op.Where(here, dt, zero)  # Δ = 0 keeps h as it is
    keys, queries = op.Where(here, B, zero), op.Where(here, C, zero)

    @graph()
    def token(h, u_t, dt_t, B_t, C_t, reset_t):
        last = op.Constant(value_ints=[2])
        held = op.Where(op.Unsqueeze(reset_t, last), op.Constant(value_float=0.0), h)
        fades = op.Exp(op.Mul(op.Unsqueeze(dt_t, last), A))
        adds = op.Mul(op.Unsqueeze(op.Mul(dt_t, u_t), last), op.Unsqueeze(B_t, op.Constant(value_ints=[1])))
        h_next = op.Add(op.Mul(fades, held), adds)
        y = op.Squeeze(op.MatMul(h_next, op.Unsqueeze(C_t, last)), last)
        return h_next, y

    h_T, y = op.Scan(h_0, Steps(drive), Steps(step), Steps(keys), Steps(queries), Steps(reset), body=token, num_scan_inputs=5)
    return op.Add(Steps(y), op.Mul(D, drive)), h_T


@script(OWN)
def Part(pairs, index):
    """The real (0) or imaginary (1) numbers [...] of pairs [..., 2]."""
    return op.Gather(pairs, index, axis=-1)


@script(OWN)
def DiagonalSSM(u, power, gain, C, D, h_0, reset, valid):
    """u [B, T, D], e^{ΔA} and (e^{ΔA} − 1)/A [D, P, 2] float64, C [D, P, 2], D [D], h [B, D, P, 2] → y [B, T, D], h.

    Inside it is float64: phases add up over thousands of tokens.
    """
    here, zero_u = op.Unsqueeze(valid, op.Constant(value_ints=[2])), op.Constant(value_float=0.0)
    given = op.Where(here, u, zero_u)
    re, im = op.Constant(value_int=0), op.Constant(value_int=1)
    C_wide, h_wide = op.Cast(C, to=11), op.Cast(h_0, to=11)
    a_re, a_im, b_re, b_im, c_re, c_im = (
        Part(power, re),
        Part(power, im),
        Part(gain, re),
        Part(gain, im),
        Part(C_wide, re),
        Part(C_wide, im),
    )

    @graph()
    def token(h_re, h_im, u_t, reset_t, valid_t):
        last = op.Constant(value_ints=[2])
        cut, read, drive = op.Unsqueeze(reset_t, last), op.Unsqueeze(valid_t, last), op.Unsqueeze(u_t, last)
        zero = op.CastLike(op.Constant(value_float=0.0), h_re)
        x, y = op.Where(cut, zero, h_re), op.Where(cut, zero, h_im)
        x_new = op.Add(op.Sub(op.Mul(a_re, x), op.Mul(a_im, y)), op.Mul(b_re, drive))
        y_new = op.Add(op.Add(op.Mul(a_re, y), op.Mul(a_im, x)), op.Mul(b_im, drive))
        out = op.ReduceSum(op.Sub(op.Mul(c_re, x_new), op.Mul(c_im, y_new)), last, keepdims=0)
        return op.Where(read, x_new, x), op.Where(read, y_new, y), op.Add(out, out)

    marks, steps = Steps(reset), Steps(op.Cast(given, to=11))
    x_T, y_T, o = op.Scan(Part(h_wide, re), Part(h_wide, im), steps, marks, Steps(valid), body=token, num_scan_inputs=3)
    last = op.Constant(value_ints=[-1])
    y = op.Where(here, op.Add(op.Cast(Steps(o), to=1), op.Mul(D, given)), zero_u)
    return y, op.Cast(op.Concat(op.Unsqueeze(x_T, last), op.Unsqueeze(y_T, last), axis=-1), to=1)


@script(OWN)
def Look(M, key, share):
    """M [B, n, L, m], key [B, m], already scaled, share [B, n] → [B, 1, n·L]: a softmax in each bank, times the bank's share."""
    column = op.Unsqueeze(key, op.Constant(value_ints=[1, 3]))  # [B, 1, m, 1]
    alpha = op.Softmax(op.MatMul(M, column), axis=2)
    return op.Mul(alpha, op.Unsqueeze(share, op.Constant(value_ints=[2, 3])))  # [B, n, L, 1]


@script(OWN)
def MomGRU(given, by_h, by_c, candidate, after, after_bias, router, router_bias, M_first, h_0, M_0, reset, valid):
    """given [B, T, hidden + m + 3D], what x contributes to router, query and gates; weights [in, out]; h [B, D], M [B, n, L, m],
    M_first [n, L, m] → h of each token [B, T, D], h, M."""
    d, m = op.Shape(h_0, start=1, end=2), op.Shape(M_0, start=3, end=4)
    hidden = op.Shape(router, start=0, end=1)
    parts_x = op.Concat(hidden, m, op.Add(d, d), d, axis=0)
    parts_h = op.Concat(hidden, m, op.Add(d, d), axis=0)
    halves = op.Concat(d, d, axis=0)
    more = op.Sub(op.Shape(after, start=1, end=2), op.Add(op.Add(m, m), op.Constant(value_ints=[1])))  # m, or 0 if v erases, too
    scale = op.Sqrt(op.Cast(m, to=1))

    @graph()
    def token(h, M, given_t, reset_t, valid_t):
        middle = op.Constant(value_ints=[1])
        cut, read = op.Unsqueeze(reset_t, op.Constant(value_ints=[2, 3])), op.Unsqueeze(valid_t, op.Constant(value_ints=[2, 3]))
        h_old = op.Where(reset_t, op.Constant(value_float=0.0), h)
        M_old = op.Where(cut, M_first, M)
        route_x, query_x, gates_x, new_x = op.Split(given_t, parts_x, axis=1)
        route_h, query_h, gates_h = op.Split(op.MatMul(h_old, by_h), parts_h, axis=1)
        rho = op.Softmax(op.Add(op.MatMul(op.Relu(op.Add(route_x, route_h)), router), router_bias), axis=-1)  # [B, n]
        seen = Look(M_old, op.Div(op.Add(query_x, query_h), scale), rho)
        c = op.ReduceSum(op.Mul(seen, M_old), op.Constant(value_ints=[1, 2]), keepdims=0)  # [B, m]
        gates_c, new_c = op.Split(op.MatMul(c, by_c), op.Concat(op.Add(d, d), d, axis=0), axis=1)
        r, zeta = op.Split(op.Add(op.Add(gates_x, gates_c), gates_h), halves, axis=1)  # before σ
        fresh = op.Tanh(op.Add(op.Add(new_x, new_c), op.MatMul(op.Mul(Logistic(r), h_old), candidate)))
        h_new = op.Add(op.Mul(Logistic(zeta), h_old), op.Mul(Logistic(op.Neg(zeta)), fresh))
        k, v, e, gamma = op.Split(op.Add(op.MatMul(h_new, after), after_bias), op.Concat(m, m, more, middle, axis=0), axis=1)
        w = Look(M_old, op.Div(k, scale), op.Mul(rho, Logistic(gamma)))  # [B, n, L, 1]
        # of the two, the one that is there
        erase = op.Slice(op.Concat(v, e, axis=1), op.Neg(m), op.Constant(value_ints=[9223372036854775807]), middle)
        row = op.Constant(value_ints=[1, 2])
        change = op.Sub(op.Unsqueeze(op.Tanh(v), row), op.Mul(op.Unsqueeze(Logistic(erase), row), M_old))
        M_new = op.Add(M_old, op.Mul(w, change))
        # onnxruntime wants to know the rank of what is carried, and cannot tell it behind a Split
        h_next = op.Reshape(op.Where(valid_t, h_new, h_old), op.Shape(h))
        M_next = op.Reshape(op.Where(read, M_new, M_old), op.Shape(M))
        return h_next, M_next, op.Identity(h_next)

    h_T, M_T, o = op.Scan(h_0, M_0, Steps(given), Steps(reset), Steps(valid), body=token, num_scan_inputs=3)
    # a MatMul right behind a Transpose in float16 makes onnxruntime 1.31 crash when it opens the file
    return op.Reshape(Steps(o), op.Concat(op.Shape(given, start=0, end=2), d, axis=0)), h_T, M_T
