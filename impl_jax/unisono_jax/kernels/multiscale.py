"""Attention at several time scales and its gradients as sweeps over time in Pallas, the state of one scale on chip.

    r_t = q_tᵀ S_t / D_t,  D_t = q'_t·z_t + ε,  S_t = λ_t S_{t−1} + k_t v_tᵀ,  z_t = λ_t z_{t−1} + k'_t,  o = Σ_s c^s r^s

With F(t, j) = λ_{j+1} … λ_t, w_t = c_t / D_t and δ_t = do_t·r_t, the gradients of one scale are

    dq_t = w_t Σ_{j≤t} F(t, j) (v_j·do_t) k_j,  dq'_t = −w_t δ_t Σ_{j≤t} F(t, j) k'_j,  dc_t = δ_t
    dk_j = Σ_{t≥j} F(t, j) (v_j·do_t) w_t q_t,  dk'_j = −Σ_{t≥j} F(t, j) w_t δ_t q'_t,  dv_j = Σ_{t≥j} F(t, j) (k_j·q_t) w_t do_t
    d log λ_i = Σ_{j<i≤t} F(t, j) w_t ((q_t·k_j) (v_j·do_t) − δ_t q'_t·k'_j)

A program owns one scale of one head of one segment of time, cut as linear attention is; sums over scales are XLA's. What reaches log λ is
told apart by what it crosses: pairs of one chunk, a chunk's tokens and the states around it, and those two states. What reaches the final
state is added to all of them.

Rounded to the dtype before a product: masked scores, w q, what a state takes of k, and the state that a chunk reads; and each scale's r, dq
and dk. Sums, states, D and z are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from unisono_jax.kernels import linear_attention as single
from unisono_jax.kernels.linear_attention import Arrays, Cut, Refs, _ahead, _dot, _kept, _later, _marks, _powers_of_two, _sequences
from unisono_jax.kernels.operator import operator, outlined
from unisono_jax.ops.carry import carried
from unisono_jax.registry import interpreted

EPS = 1e-6
LOG2E = float(np.log2(np.e))
FAINT = -120.0  # log λ below which e^x is 0 anyway: sums of them keep their digits
NARROW, WIDE = (4, 3), (8, 2)  # warps and stages; WIDE where a head is wider than 64
TOKENS, OUT = ("q", "k", "v", "q_norm", "k_norm"), ("r", "dq", "dk", "dv", "dq_norm", "dk_norm")
NUMBERS = ("D", "w", "delta", "enters", "leaves", "crosses")


def _faded(decay: jax.Array, own: Any, size: int, transposed: bool = False) -> jax.Array:
    """F inside a chunk: [query, key], or [key, query]."""
    x = decay[None, :] - decay[:, None] if transposed else decay[:, None] - decay[None, :]
    return jnp.exp2(jnp.where(_ahead(own, size, transposed), x, -jnp.inf))


def _wide(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float32)


def _forward(refs: Refs, cut: Cut) -> None:
    """r, D and the final state; without q, only what the segment adds to the state."""
    k, v, writes = refs["k"], refs["v"], "q" in refs
    apart = "k_norm" in refs
    dtype = k.dtype

    def chunk(i: Any, carry: Any) -> Any:
        S, z = carry
        at = pl.ds(i * cut.size, cut.size)
        own, reads, leaves, goes_on = _marks(refs, at, i)
        k_c, v_c, decay = k[at, :], v[at, :], refs["decay"][at]
        kn_c = refs["k_norm"][at, :] if apart else k_c
        last = jnp.min(decay)
        if writes:
            q_c = refs["q"][at, :]
            qn_c = refs["q_norm"][at, :] if apart else q_c
            fade, kept = _faded(decay, own, cut.size), jnp.exp2(decay)
            scores = fade * _dot(q_c, k_c, 1, 1)
            norms = fade * _dot(qn_c, kn_c, 1, 1) if apart else scores
            bottom = norms.sum(1) + kept * (_wide(_kept(reads, qn_c)) * z[None, :]).sum(1) + EPS
            top = _dot(scores.astype(dtype), v_c) + kept[:, None] * _dot(_kept(reads, q_c), S.astype(dtype))
            refs["r"][at, :] = (top / bottom[:, None]).astype(dtype)
            refs["D"][at] = bottom
        still, whole = jnp.exp2(last - decay)[:, None], jnp.exp2(last)
        into = (_wide(_kept(leaves, k_c)) * still).astype(dtype)
        S = whole * _kept(goes_on, S) + _dot(into, v_c, 0, 0)
        return S, whole * _kept(goes_on, z) + (_wide(_kept(leaves, kn_c)) * still).sum(0)

    refs["S_out"][...], refs["z_out"][...] = lax.fori_loop(0, cut.chunks, chunk, _first(refs, writes))


def _first(refs: Refs, writes: bool) -> tuple[jax.Array, jax.Array]:
    if writes:
        return refs["S"][...], refs["z"][...]
    return jnp.zeros(refs["S_out"].shape, jnp.float32), jnp.zeros(refs["z_out"].shape, jnp.float32)


def _backward_q(refs: Refs, cut: Cut) -> None:
    """dq and dq', the states before chunks, and what reaches a chunk's decays by the state before it."""
    q, k, v, do = refs["q"], refs["k"], refs["v"], refs["do"]
    apart = "k_norm" in refs
    dtype = k.dtype

    def chunk(i: Any, carry: Any) -> Any:
        S, z = carry
        refs["past"][i], refs["past_z"][i] = S.astype(dtype), z
        at = pl.ds(i * cut.size, cut.size)
        own, reads, leaves, goes_on = _marks(refs, at, i)
        q_c, k_c, v_c, do_c, decay = q[at, :], k[at, :], v[at, :], do[at, :], refs["decay"][at]
        w, delta = refs["w"][at], refs["delta"][at]
        qn_c, kn_c = (refs["q_norm"][at, :], refs["k_norm"][at, :]) if apart else (q_c, k_c)
        fade, kept = _faded(decay, own, cut.size), jnp.exp2(decay)[:, None]
        to_q, to_qn = kept * _kept(reads, _dot(do_c, S.astype(dtype), 1, 1)), -kept * _kept(reads, delta[:, None] * z[None, :])
        refs["enters"][at] = w * ((_wide(q_c) * to_q).sum(1) + (_wide(qn_c) * to_qn).sum(1))
        scores = _dot(do_c, v_c, 1, 1)
        if apart:
            to_q = to_q + _dot((fade * scores).astype(dtype), k_c)
            to_qn = to_qn - delta[:, None] * _dot(fade.astype(dtype), kn_c)
            refs["dq_norm"][at, :] = (to_qn * w[:, None]).astype(refs["dq_norm"].dtype)
        else:
            to_q = to_q + to_qn + _dot((fade * (scores - delta[:, None])).astype(dtype), k_c)
        refs["dq"][at, :] = (to_q * w[:, None]).astype(refs["dq"].dtype)
        last = jnp.min(decay)
        still, whole = jnp.exp2(last - decay)[:, None], jnp.exp2(last)
        into = (_wide(_kept(leaves, k_c)) * still).astype(dtype)
        S = whole * _kept(goes_on, S) + _dot(into, v_c, 0, 0)
        return S, whole * _kept(goes_on, z) + (_wide(_kept(leaves, kn_c)) * still).sum(0)

    lax.fori_loop(0, cut.chunks, chunk, _first(refs, True))


def _backward_kv(refs: Refs, cut: Cut) -> None:
    """dk, dk', dv, what else reaches decays, and the gradient of the state before; without k, only what the segment adds to that."""
    q, do, writes = refs["q"], refs["do"], "k" in refs
    apart = "q_norm" in refs
    dtype = q.dtype

    def chunk(n: Any, carry: Any) -> Any:
        dS, dz = carry
        i = cut.chunks - 1 - n
        at = pl.ds(i * cut.size, cut.size)
        own, reads, leaves, goes_on = _marks(refs, at, i)
        do_c, decay, w, delta = do[at, :], refs["decay"][at], refs["w"][at], refs["delta"][at]
        last, kept = jnp.min(decay), jnp.exp2(decay)
        whole = jnp.exp2(last)
        q_c = _wide(q[at, :]) * w[:, None]
        qn_c = _wide(refs["q_norm"][at, :]) * w[:, None] if apart else q_c
        if writes:
            k_c, v_c = refs["k"][at, :], refs["v"][at, :]
            kn_c = refs["k_norm"][at, :] if apart else k_c
            p = q_c.astype(dtype)
            fade = _faded(decay, own, cut.size, True)
            by_k, by_v = fade * _dot(k_c, p, 1, 1), _dot(v_c, do_c, 1, 1)
            narrow, still = dS.astype(dtype), jnp.exp2(last - decay)[:, None]
            to_v = _dot(by_k.astype(dtype), do_c) + _kept(leaves, still * _dot(k_c, narrow))
            refs["dv"][at, :] = to_v.astype(refs["dv"].dtype)
            to_k, to_kn = _kept(leaves, still * _dot(v_c, narrow, 1, 1)), _kept(leaves, still * dz[None, :])
            refs["leaves"][at] = (_wide(k_c) * to_k).sum(1) + (_wide(kn_c) * to_kn).sum(1)
            if apart:
                p_n = (qn_c * delta[:, None]).astype(dtype)
                pairs = by_k * by_v - fade * _dot(kn_c, p_n, 1, 1)
                to_k = to_k + _dot((fade * by_v).astype(dtype), p)
                refs["dk_norm"][at, :] = (to_kn - _dot(fade.astype(dtype), p_n)).astype(refs["dk_norm"].dtype)
            else:
                by_v = by_v - delta[None, :]
                pairs = by_k * by_v
                to_k = to_k + to_kn + _dot((fade * by_v).astype(dtype), p)
            refs["dk"][at, :] = to_k.astype(refs["dk"].dtype)
            row, column = (lax.broadcasted_iota(jnp.int32, (cut.size, cut.size), axis) for axis in (0, 1))
            later = _dot(pairs.astype(dtype), jnp.where(row >= column, 1.0, 0.0).astype(dtype))  # [j, i]: over t ≥ i
            through = whole * _kept(goes_on, (_wide(refs["past"][i]) * dS).sum() + (refs["past_z"][i] * dz).sum())
            refs["crosses"][at] = jnp.where(row < column, later, 0.0).sum(0) + through
        reading = (_kept(reads, q_c) * kept[:, None]).astype(dtype)
        back = (_kept(reads, qn_c) * (kept * delta)[:, None]).sum(0)
        return whole * _kept(goes_on, dS) + _dot(reading, do_c, 0, 0), whole * _kept(goes_on, dz) - back

    refs["S_out"][...], refs["z_out"][...] = lax.fori_loop(0, cut.chunks, chunk, _first(refs, writes))


def _launch(kernel: Callable[[Refs, Cut], None], cut: Cut, inputs: Arrays, outputs: Mapping[str, tuple[tuple[int, ...], Any]]) -> Arrays:
    """Run `kernel` for each scale of each head of each segment; outputs: shapes and dtypes.

    By name, arrays are tokens [B, T, H, ·] or of scales [B, T, M, H, ·], numbers [B, M, H, T], decay [B, M, T], marks [B, T], [B, N],
    states before segments [B, G, M, H, ·] or [B, G, M, H, ·, ·], and past, before chunks [B, N, M, H, …].
    """
    heads, count, length = cut.heads, cut.segments, cut.chunks * cut.size
    scales = inputs["decay"].shape[1]

    def at(p: Any) -> tuple[Any, Any, Any, Any]:
        return p // (scales * heads * count), p // (heads * count) % scales, p // count % heads, p % count

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        def place(p: Any) -> tuple[Any, ...]:
            batch, scale, head, order = at(p)
            if name in NUMBERS:
                return batch, scale, head, order
            if name == "decay":
                return batch, scale, order
            if name in ("segment", "before"):
                return batch, order
            if name in TOKENS or (name == "do" and len(shape) == 4):
                return batch, order, head, 0
            return batch, order, scale, head, *(0,) * (len(shape) - 4)

        if name in NUMBERS:
            return pl.BlockSpec((None, None, None, length), place)
        if name == "decay":
            return pl.BlockSpec((None, None, length), place)
        if name in ("segment", "before"):
            return pl.BlockSpec((None, length if name == "segment" else cut.chunks), place)
        if name in TOKENS or (name == "do" and len(shape) == 4):
            return pl.BlockSpec((None, length, None, shape[3]), place)
        if name in OUT or name == "do":
            return pl.BlockSpec((None, length, None, None, shape[4]), place)
        if name in ("past", "past_z"):
            return pl.BlockSpec((None, cut.chunks, None, None, *shape[4:]), place)
        return pl.BlockSpec((None, None, None, None, *shape[4:]), place)

    def body(*refs: Any) -> None:
        kernel(dict(zip((*inputs, *outputs), refs, strict=True)), cut)

    found = pl.pallas_call(
        body,
        grid=(len(inputs["decay"]) * scales * heads * count,),
        in_specs=[spec(name, a.shape) for name, a in inputs.items()],
        out_specs=[spec(name, shape) for name, (shape, _) in outputs.items()],
        out_shape=outlined(outputs.values(), next(iter(inputs.values()))),
        compiler_params=plt.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=cut.interpret,
        name=f"multiscale{kernel.__name__}",
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


def _cut(k: jax.Array, v: jax.Array, scales: int, interpret: bool) -> Cut:
    """From shapes alone, so that a result's bits do not depend on the GPU."""
    batch, length, heads, _ = k.shape
    count = max(1, min(-(-single.PROGRAMS // (batch * heads * scales)), length // single.SHORTEST))
    chunks = -(-length // (count * single.SIZE))
    warps = WIDE if max(k.shape[3], v.shape[3]) > 64 else NARROW
    return Cut(single.SIZE, chunks, -(-length // (chunks * single.SIZE)), heads, *warps, interpret)


def _given(arrays: Any, segment: jax.Array | None, cut: Cut) -> tuple[Arrays, jax.Array, jax.Array | None]:
    """Tokens, decay and marks, as kernels read them; what is left after each segment [B, G, M]; which of them forget the state before."""
    q, k, v, q_norm, k_norm, log_decay = arrays[:6]
    whole = cut.segments * cut.chunks * cut.size
    tokens = {"q": q, "k": k, "v": v} | ({} if q_norm is None else {"q_norm": q_norm, "k_norm": k_norm})
    given = {name: _later(_powers_of_two(a, (3,)), whole) for name, a in tokens.items()}
    log_decay = jnp.swapaxes(_later(jnp.maximum(log_decay, FAINT), whole), 1, 2)
    by_chunk = jnp.cumsum(log_decay.reshape(*log_decay.shape[:2], -1, cut.size), -1) * LOG2E  # [B, M, N, C]
    left = by_chunk[..., -1].reshape(*log_decay.shape[:2], cut.segments, cut.chunks).sum(-1)
    marks, forgets = _sequences(cut, segment)
    given |= {"decay": by_chunk.reshape(log_decay.shape), **marks}
    return given, jnp.exp2(jnp.swapaxes(left, 1, 2)), forgets


def _some(given: Arrays, *names: str) -> Arrays:
    return {name: given[name] for name in (*names, "decay", "segment", "before") if name in given}


def _swept(kernel: Any, cut: Cut, inputs: Arrays, S: jax.Array, z: jax.Array, left: Any, forgets: Any, backwards: bool = False) -> Arrays:
    """S and z before each segment (behind it, where time runs backwards): [B, G, M, H, K, V], [B, G, M, H, K]."""
    if cut.segments == 1:
        return {"S": S[:, None], "z": z[:, None]}
    shape = {"S_out": ((len(S), cut.segments, *S.shape[1:]), jnp.float32), "z_out": ((len(z), cut.segments, *z.shape[1:]), jnp.float32)}
    own = _launch(kernel, cut, inputs, shape)
    order = slice(None, None, -1 if backwards else 1)
    cuts = None if forgets is None else forgets[:, order]
    found = {}
    for n, a in (("S", S), ("z", z)):
        decay = left[:, order].reshape(*left.shape, *(1,) * (a.ndim - 2))
        found[n] = carried(own[f"{n}_out"][:, order], a, cuts, decay)[0][:, order]
    return found


def _forward_of(interpret: bool, arrays: Any, segment: jax.Array | None) -> Any:
    """arrays: q, k, v, q', k' (or None), log λ, c (or None), S, z. → (o, or r without c, and the final state), what the gradient needs."""
    q, k, v, _, _, log_decay, weight, S, z = arrays
    (batch, length, heads, K), V, scales = q.shape, v.shape[3], log_decay.shape[2]
    cut = _cut(k, v, scales, interpret)
    given, left, forgets = _given(arrays, segment, cut)
    S, z = _powers_of_two(S, (3, 4)), _powers_of_two(z, (3,))
    states = _swept(_forward, cut, _some(given, "k", "v", "k_norm"), S, z, left, forgets)
    whole = given["v"].shape[1]
    outputs = {"r": ((batch, whole, scales, heads, given["v"].shape[3]), v.dtype), "D": ((batch, scales, heads, whole), jnp.float32)}
    outputs |= {"S_out": (states["S"].shape, jnp.float32), "z_out": (states["z"].shape, jnp.float32)}
    found = _launch(_forward, cut, _some(given, "q", "k", "v", "q_norm", "k_norm") | states, outputs)
    r = found["r"][:, :length, ..., :V]
    final = found["S_out"][:, -1, ..., :K, :V], found["z_out"][:, -1, ..., :K]
    o = r if weight is None else (weight * _wide(r)).sum(2)
    return (o, *final), (r, found["D"], states)


def _backward_of(interpret: bool, arrays: Any, segment: jax.Array | None, saved: Any, cotangents: Any) -> Any:
    q, k, v, q_norm, k_norm, log_decay, weight, *_ = arrays
    r, D, states = saved
    do, dS, dz = cotangents
    (batch, length, heads, K), V, scales = q.shape, v.shape[3], log_decay.shape[2]
    cut = _cut(k, v, scales, interpret)
    given, left, forgets = _given(arrays, segment, cut)
    whole = given["v"].shape[1]

    def numbers(a: jax.Array) -> jax.Array:
        """[B, T, M, H] → [B, M, H, T]."""
        return jnp.moveaxis(_later(jnp.broadcast_to(a, (batch, length, scales, heads)), whole), 1, 3)

    delta = (_wide(do if weight is None else do[:, :, None]) * _wide(r)).sum(-1)  # [B, T, M, H]
    w = 1 / D if weight is None else numbers(weight[..., 0]) / D
    given |= {"do": _later(_powers_of_two(do.astype(v.dtype), (do.ndim - 1,)), whole), "w": w, "delta": numbers(delta)}
    apart, wide, value = q_norm is not None, given["q"].shape[3], given["v"].shape[3]
    tokens, per = (batch, whole, scales, heads), ((batch, scales, heads, whole), jnp.float32)
    chunks = (batch, whole // cut.size, scales, heads, wide)
    outputs = {"dq": ((*tokens, wide), v.dtype), "enters": per, "past": ((*chunks, value), v.dtype), "past_z": (chunks, jnp.float32)}
    outputs |= {"dq_norm": ((*tokens, wide), v.dtype)} if apart else {}
    found = _launch(_backward_q, cut, _some(given, "q", "k", "v", "q_norm", "k_norm", "do", "w", "delta") | states, outputs)
    given |= {name: found[name] for name in ("past", "past_z")}
    dS, dz = _powers_of_two(dS, (3, 4)), _powers_of_two(dz, (3,))
    behind = _swept(_backward_kv, cut, _some(given, "q", "q_norm", "do", "w", "delta"), dS, dz, left, forgets, backwards=True)
    sums = jnp.float32 if scales > 1 else v.dtype
    outputs = {"dk": ((*tokens, wide), v.dtype), "dv": ((*tokens, value), sums), "leaves": per, "crosses": per}
    outputs |= {"dk_norm": ((*tokens, wide), v.dtype)} if apart else {}
    outputs |= {"S_out": (behind["S"].shape, jnp.float32), "z_out": (behind["z"].shape, jnp.float32)}
    inputs = _some(given, "q", "k", "v", "q_norm", "k_norm", "do", "w", "delta", "past", "past_z") | behind
    found |= _launch(_backward_kv, cut, inputs, outputs)

    def of_tokens(name: str, like: jax.Array | None) -> jax.Array | None:
        if like is None:
            return None
        return _wide(found[name][:, :length, ..., : like.shape[-1]]).sum(2).astype(like.dtype)

    enters, leaves, crosses = (found[n].sum(2).reshape(batch, scales, -1, cut.size) for n in ("enters", "leaves", "crosses"))
    to_decay = crosses + lax.cumsum(enters, 3, reverse=True) + jnp.cumsum(leaves, 3) - leaves
    to_decay = jnp.swapaxes(to_decay.reshape(batch, scales, whole), 1, 2)[:, :length]
    to_weight = None
    if weight is not None:
        to_weight = delta if weight.shape[3] > 1 else delta.sum(3, keepdims=True)
        to_weight = to_weight[..., None].astype(weight.dtype)
    return (
        of_tokens("dq", q), of_tokens("dk", k), of_tokens("dv", v), of_tokens("dq_norm", q_norm), of_tokens("dk_norm", k_norm),
        to_decay, to_weight, found["S_out"][:, 0, ..., :K, :V], found["z_out"][:, 0, ..., :K],
    )  # fmt: skip


def _plain(arrays: Any, segment: jax.Array | None) -> tuple[jax.Array, ...]:
    from unisono_jax.ops import multiscale

    q, k, v, q_norm, k_norm, log_decay, weight, *state = arrays
    reset = None if segment is None else jnp.diff(segment, axis=1, prepend=0) > 0
    if q_norm is None:
        q_norm, k_norm = q, k
    if weight is not None:
        o, last = multiscale.parallel(q, k, v, q_norm, k_norm, log_decay, weight, tuple(state), reset, implementation="plain")
        return o, *last
    reads, lasts = [], []
    for s in range(log_decay.shape[2]):
        of = slice(s, s + 1)
        one = jnp.ones((*log_decay.shape[:2], 1, 1, 1), log_decay.dtype)
        given = (q, k, v, q_norm, k_norm, log_decay[:, :, of], one, tuple(a[:, of] for a in state))
        o, last = multiscale.parallel(*given, reset, implementation="plain")
        reads.append(o.astype(v.dtype))
        lasts.append(last)
    return jnp.stack(reads, 2), *(jnp.concatenate(a, 1) for a in zip(*lasts, strict=True))


_run = operator(_forward_of, _backward_of, _plain)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    log_decay: jax.Array,
    weight: jax.Array,
    state: tuple[jax.Array, jax.Array],
    reset: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """As ops/multiscale.py, of tokens that are all valid → o and the final state in float32. q, k, q' and k' are rounded to v's dtype."""
    apart = not (q_norm is q and k_norm is k)
    norms = (q_norm.astype(v.dtype), k_norm.astype(v.dtype)) if apart else (None, None)
    segment = None if reset is None else jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    log_decay, weight, S, z = (_wide(a) for a in (log_decay, weight, *state))
    inside = weight.shape[-1] == 1  # else a scale's gradient comes to it weighed already
    given = (q.astype(v.dtype), k.astype(v.dtype), v, *norms, log_decay, weight if inside else None, S, z)
    o, S, z = _run(interpreted(), given, segment)
    return o if inside else (weight * _wide(o)).sum(2), (S, z)
