"""Normalised linear attention and its gradients as sweeps over time in Pallas, the state on chip.

    o_t = q_tᵀ S_t / D_t,  D_t = q_t·z_t + ε,  S_t = S_{t−1} + k_t v_tᵀ,  z_t = z_{t−1} + k_t

With δ_t = do_t·o_t and p_t = q_t / D_t, the gradients are sums of the same kind, the last two from the last token to the first:

    dq_t = Σ_{j≤t} (v_j·do_t − δ_t) k_j / D_t
    dk_j = Σ_{t≥j} (v_j·do_t − δ_t) p_t + dS v_j + dz
    dv_j = Σ_{t≥j} (k_j·p_t) do_t + dSᵀ k_j

A program owns one head of one segment of time. Where heads are few, a sequence has several segments: what each adds to the state is
swept first, and added up. Inside a segment, chunks follow each other; a chunk's products are masked matmuls.

Rounded to the dtype before a product: masked scores, p, and the state that a chunk reads. Sums, states and D are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from unisono_jax.kernels.operator import operator, outlined
from unisono_jax.ops.carry import carried
from unisono_jax.registry import interpreted

EPS = 1e-6
SIZE = 64  # tokens a chunk
PROGRAMS = 128  # that there should be: a sweep of segments first costs more than half a GPU at rest
SHORTEST = 512  # tokens that a segment has at least
COLUMNS = 64  # of v, that a program of the forward sweep has at most
BROAD = 64  # heads wider than this take WIDE, and in the forward sweep AHEAD
NARROW, WIDE, AHEAD = (4, 3), (8, 2), (4, 2)  # warps and stages
Refs = Mapping[str, Any]
Arrays = dict[str, jax.Array]
NUMBERS, MARKS, BEFORE, TOKENS = ("D", "delta"), ("segment",), ("before",), ("q", "k", "v", "do", "o", "dq", "dk", "dv")


class Cut(NamedTuple):
    """How a sweep is cut: tokens a chunk, chunks a segment, segments a sequence, heads; how it is compiled; programs a head."""

    size: int
    chunks: int
    segments: int
    heads: int
    warps: int
    stages: int
    interpret: bool
    parts: int = 1


def _dot(a: jax.Array, b: jax.Array, left: int = 1, right: int = 0) -> jax.Array:
    """a and b contracted over these axes, in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((left,), (right,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)


def _marks(refs: Refs, at: Any, i: Any) -> tuple[Any, Any, Any, Any]:
    """Of a chunk: the sequence of each token; which tokens read the state before it, and go into that after it; whether that state
    goes on."""
    if "segment" not in refs:
        return None, None, None, None
    own, past = refs["segment"][at], refs["before"][i]
    last = jnp.max(own)
    return own, own == past, own == last, last == past


def _kept(where: Any, a: jax.Array) -> jax.Array:
    """a, and 0 where a mark is false: of each row, or of all."""
    if where is None:
        return a
    return jnp.where(where[:, None] if where.ndim else where, a, jnp.zeros((), a.dtype))


def _ahead(own: Any, size: int, transposed: bool = False) -> jax.Array:
    """Which key a query may read: [query, key], or [key, query]."""
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    reads = row <= column if transposed else row >= column
    return reads if own is None else reads & (own[:, None] == own[None, :])


def _forward(refs: Refs, cut: Cut) -> None:
    """Outputs and the final state; without q, only what the segment adds to the state."""
    k, v, writes = refs["k"], refs["v"], "q" in refs
    dtype = k.dtype

    def chunk(i: Any, carry: Any) -> Any:
        S, z = carry
        at = pl.ds(i * cut.size, cut.size)
        own, reads, leaves, goes_on = _marks(refs, at, i)
        k_c, v_c = k[at, :], v[at, :]
        if writes:
            q_c = refs["q"][at, :]
            scores = jnp.where(_ahead(own, cut.size), _dot(q_c, k_c, 1, 1), 0.0)
            past = _kept(reads, q_c)
            bottom = scores.sum(1) + (past.astype(jnp.float32) * z[None, :]).sum(1) + EPS
            top = _dot(scores.astype(dtype), v_c) + _dot(past, S.astype(dtype))
            refs["o"][at, :] = (top / bottom[:, None]).astype(dtype)
            refs["D"][at] = bottom
        into = _kept(leaves, k_c)
        return _kept(goes_on, S) + _dot(into, v_c, 0, 0), _kept(goes_on, z) + into.astype(jnp.float32).sum(0)

    first = (refs["S"][...], refs["z"][...]) if writes else tuple(jnp.zeros(refs[n].shape, jnp.float32) for n in ("S_out", "z_out"))
    refs["S_out"][...], refs["z_out"][...] = lax.fori_loop(0, cut.chunks, chunk, first)


def _backward_q(refs: Refs, cut: Cut) -> None:
    k, v, do = refs["k"], refs["v"], refs["do"]
    dtype = k.dtype

    def chunk(i: Any, carry: Any) -> Any:
        S, z = carry  # [V, K]
        at = pl.ds(i * cut.size, cut.size)
        own, reads, leaves, goes_on = _marks(refs, at, i)
        k_c, v_c, do_c, delta = k[at, :], v[at, :], do[at, :], refs["delta"][at]
        scores = jnp.where(_ahead(own, cut.size), _dot(do_c, v_c, 1, 1) - delta[:, None], 0.0)
        past = _dot(do_c, S.astype(dtype)) - delta[:, None] * z[None, :]
        dq = _dot(scores.astype(dtype), k_c) + _kept(reads, past)
        refs["dq"][at, :] = (dq / refs["D"][at][:, None]).astype(dtype)
        into = _kept(leaves, k_c)
        return _kept(goes_on, S) + _dot(v_c, into, 0, 0), _kept(goes_on, z) + into.astype(jnp.float32).sum(0)

    lax.fori_loop(0, cut.chunks, chunk, (refs["S"][...].T, refs["z"][...]))


def _backward_kv(refs: Refs, cut: Cut) -> None:
    """dk, dv and the gradient of the state before; without k, only what the segment adds to that."""
    q, do, writes = refs["q"], refs["do"], "k" in refs
    dtype = q.dtype

    def chunk(n: Any, carry: Any) -> Any:
        dS, dz = carry  # [K, V]
        i = cut.chunks - 1 - n
        at = pl.ds(i * cut.size, cut.size)
        own, reads, leaves, goes_on = _marks(refs, at, i)
        do_c, delta = do[at, :], refs["delta"][at]
        p = (q[at, :].astype(jnp.float32) / refs["D"][at][:, None]).astype(dtype)
        if writes:
            k_c, v_c = refs["k"][at, :], refs["v"][at, :]
            ahead = _ahead(own, cut.size, True)
            by_k = jnp.where(ahead, _dot(k_c, p, 1, 1), 0.0)
            by_v = jnp.where(ahead, _dot(v_c, do_c, 1, 1) - delta[None, :], 0.0)
            narrow = dS.astype(dtype)
            refs["dv"][at, :] = (_dot(by_k.astype(dtype), do_c) + _kept(leaves, _dot(k_c, narrow))).astype(dtype)
            to_k = _dot(v_c, narrow, 1, 1) + dz[None, :]
            refs["dk"][at, :] = (_dot(by_v.astype(dtype), p) + _kept(leaves, to_k)).astype(dtype)
        p = _kept(reads, p)
        back = (p.astype(jnp.float32) * delta[:, None]).sum(0)
        return _kept(goes_on, dS) + _dot(p, do_c, 0, 0), _kept(goes_on, dz) - back

    first = (refs["S"][...], refs["z"][...]) if writes else tuple(jnp.zeros(refs[n].shape, jnp.float32) for n in ("S_out", "z_out"))
    refs["S_out"][...], refs["z_out"][...] = lax.fori_loop(0, cut.chunks, chunk, first)


def _cut(k: jax.Array, v: jax.Array, interpret: bool) -> Cut:
    """From shapes alone, so that a result's bits do not depend on the GPU."""
    batch, length, heads, _ = k.shape
    count = max(1, min(-(-PROGRAMS // (batch * heads)), length // SHORTEST))
    chunks = -(-length // (count * SIZE))
    return Cut(SIZE, chunks, -(-length // (chunks * SIZE)), heads, *(WIDE if max(k.shape[3], v.shape[3]) > BROAD else NARROW), interpret)


def _launch(kernel: Callable[[Refs, Cut], None], cut: Cut, inputs: Arrays, outputs: Mapping[str, tuple[tuple[int, ...], Any]]) -> Arrays:
    """Run `kernel` for each head of each segment; outputs: shapes and dtypes.

    By name, arrays are tokens [B, T, H, ·], numbers [B, H, T], marks [B, T], [B, N], and states [B, G, H, ·] or [B, G, H, ·, ·].
    """
    heads, count, length = cut.heads * cut.parts, cut.segments, cut.chunks * cut.size

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        def at(p: Any) -> tuple[Any, Any, Any]:
            return p // (heads * count), p // count % heads, p % count

        def marks(p: Any) -> tuple[Any, Any]:
            return p // (heads * count), p % count

        def tokens(p: Any) -> tuple[Any, ...]:
            batch, head, order = at(p)
            return batch, order, head // cut.parts if name in ("q", "k") else head, 0

        def states(p: Any) -> tuple[Any, ...]:
            batch, head, order = at(p)
            return batch, order, head, *(0,) * (len(shape) - 3)

        if name in TOKENS:
            return pl.BlockSpec((None, length, None, shape[3]), tokens)
        if name in NUMBERS:
            return pl.BlockSpec((None, None, length), at)
        if name in MARKS:
            return pl.BlockSpec((None, length), marks)
        return pl.BlockSpec((None, cut.chunks), marks) if name in BEFORE else pl.BlockSpec((None, None, None, *shape[3:]), states)

    def body(*refs: Any) -> None:
        kernel(dict(zip((*inputs, *outputs), refs, strict=True)), cut)

    batch = next(iter(inputs.values())).shape[0]
    found = pl.pallas_call(
        body,
        grid=(batch * heads * count,),
        in_specs=[spec(name, a.shape) for name, a in inputs.items()],
        out_specs=[spec(name, shape) for name, (shape, _) in outputs.items()],
        out_shape=outlined(outputs.values(), next(iter(inputs.values()))),
        compiler_params=plt.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=cut.interpret,
        name=kernel.__name__.strip("_"),
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


def _powers_of_two(a: jax.Array, axes: tuple[int, ...], least: int = 16) -> jax.Array:
    """Zeros after the end of these axes, which Pallas wants of a power of two."""
    widths = [(0, max(least, 1 << (n - 1).bit_length()) - n if i in axes else 0) for i, n in enumerate(a.shape)]
    return jnp.pad(a, widths) if any(more for _, more in widths) else a


def _later(a: jax.Array, length: int, mode: str = "constant") -> jax.Array:
    """[B, T, …] → [B, length, …]."""
    behind = length - a.shape[1]
    return jnp.pad(a, ((0, 0), (0, behind), *((0, 0),) * (a.ndim - 2)), mode=mode) if behind else a


def _sequences(cut: Cut, segment: jax.Array | None) -> tuple[Arrays, jax.Array | None]:
    """segment and before, as kernels read them; which segments of time forget the state before them [B, G]."""
    if segment is None:
        return {}, None
    segment = _later(segment, cut.segments * cut.chunks * cut.size, "edge")
    ends = segment.reshape(len(segment), -1, cut.size)[:, :, -1]
    before = jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    return {"segment": segment, "before": before}, ends[:, cut.chunks - 1 :: cut.chunks] != before[:, :: cut.chunks]


def _swept(kernel: Any, cut: Cut, inputs: Arrays, S: jax.Array, z: jax.Array, forgets: Any, backwards: bool = False) -> Arrays:
    """S and z before each segment (behind it, where time runs backwards): [B, G, H, K, V], [B, G, H, K]."""
    if cut.segments == 1:
        return {"S": S[:, None], "z": z[:, None]}
    shape = {"S_out": ((len(S), cut.segments, *S.shape[1:]), jnp.float32), "z_out": ((len(z), cut.segments, *z.shape[1:]), jnp.float32)}
    own = _launch(kernel, cut, inputs, shape)
    order = slice(None, None, -1 if backwards else 1)
    cuts = None if forgets is None else forgets[:, order]
    return {n: carried(own[f"{n}_out"][:, order], a, cuts)[0][:, order] for n, a in (("S", S), ("z", z))}


def _run_forward(arrays: Any, segment: jax.Array | None, cut: Cut) -> Arrays:
    """o, S_out, z_out; D and the states before segments, S and z, for the gradient."""
    q, k, v, S, z = arrays
    (batch, length, heads, K), V = q.shape, v.shape[3]
    whole = cut.segments * cut.chunks * cut.size
    q, k, v = (_later(_powers_of_two(a, (3,)), whole) for a in (q, k, v))
    wide = v.shape[3]
    if max(q.shape[3], wide) > BROAD:
        cut = cut._replace(parts=max(1, wide // COLUMNS), warps=AHEAD[0], stages=AHEAD[1])
    S, z = _columns(_powers_of_two(S, (2, 3)), cut), jnp.repeat(_powers_of_two(z, (2,)), cut.parts, 1)
    v = v.reshape(batch, whole, heads * cut.parts, -1)
    marks, forgets = _sequences(cut, segment)
    states = _swept(_forward, cut, {"k": k, "v": v, **marks}, S, z, forgets)
    outputs = {"o": (v.shape, v.dtype), "D": ((batch, heads * cut.parts, whole), jnp.float32)}
    outputs |= {"S_out": (states["S"].shape, jnp.float32), "z_out": (states["z"].shape, jnp.float32)}
    found = _launch(_forward, cut, {"q": q, "k": k, "v": v, **marks, **states}, outputs)
    states = {"S": _joined(states["S"], cut), "z": states["z"][:, :, :: cut.parts], "D": found["D"][:, :: cut.parts]}
    o, S = found["o"].reshape(batch, whole, heads, wide), _joined(found["S_out"][:, -1:], cut)[:, 0]
    return {**states, "o": o[:, :length, :, :V], "S_out": S[..., :K, :V], "z_out": found["z_out"][:, -1, :: cut.parts, :K]}


def _columns(S: jax.Array, cut: Cut) -> jax.Array:
    """[B, H, K, V] → [B, H · parts, K, V / parts]."""
    batch, heads, keys, _ = S.shape
    return jnp.moveaxis(S.reshape(batch, heads, keys, cut.parts, -1), 3, 2).reshape(batch, heads * cut.parts, keys, -1)


def _joined(S: jax.Array, cut: Cut) -> jax.Array:
    """[B, G, H · parts, K, V / parts] → [B, G, H, K, V]."""
    batch, count, _, keys, _ = S.shape
    return jnp.moveaxis(S.reshape(batch, count, cut.heads, cut.parts, keys, -1), 3, 4).reshape(batch, count, cut.heads, keys, -1)


def _run_backward(saved: Arrays, segment: jax.Array | None, do: jax.Array, dS: jax.Array, dz: jax.Array, cut: Cut) -> tuple[jax.Array, ...]:
    """dq, dk, dv, dS, dz."""
    q, k, v, D = (saved[n] for n in ("q", "k", "v", "D"))
    (_, length, _, K), V = q.shape, v.shape[3]
    whole = cut.segments * cut.chunks * cut.size
    delta = (do.astype(jnp.float32) * saved["o"].astype(jnp.float32)).sum(-1)
    delta = jnp.swapaxes(_later(delta, whole), 1, 2)
    q, k, v, do = (_later(_powers_of_two(a, (3,)), whole) for a in (q, k, v, do.astype(v.dtype)))
    dS, dz = _powers_of_two(dS, (2, 3)), _powers_of_two(dz, (2,))
    marks, forgets = _sequences(cut, segment)
    numbers = {"D": D, "delta": delta}
    states = {name: saved[name] for name in ("S", "z")}
    dq = _launch(_backward_q, cut, {"k": k, "v": v, "do": do, **marks, **numbers, **states}, {"dq": (q.shape, q.dtype)})["dq"]
    later = _swept(_backward_kv, cut, {"q": q, "do": do, **marks, **numbers}, dS, dz, forgets, backwards=True)
    outputs = {"dk": (k.shape, k.dtype), "dv": (v.shape, v.dtype)}
    outputs |= {"S_out": (later["S"].shape, jnp.float32), "z_out": (later["z"].shape, jnp.float32)}
    found = _launch(_backward_kv, cut, {"q": q, "k": k, "v": v, "do": do, **marks, **numbers, **later}, outputs)
    dq, dk, dv = dq[:, :length, :, :K], found["dk"][:, :length, :, :K], found["dv"][:, :length, :, :V]
    return dq, dk, dv, found["S_out"][:, 0, :, :K, :V], found["z_out"][:, 0, :, :K]


def _forward_of(interpret: bool, arrays: Any, segment: jax.Array | None) -> Any:
    """arrays: q, k, v, S, z. → (o, S, z), what the gradient needs."""
    found = _run_forward(arrays, segment, _cut(arrays[1], arrays[2], interpret))
    return tuple(found[name] for name in ("o", "S_out", "z_out")), {name: found[name] for name in ("o", "D", "S", "z")}


def _backward_of(interpret: bool, arrays: Any, segment: jax.Array | None, saved: Arrays, cotangents: Any) -> Any:
    given = dict(zip("qkv", arrays, strict=False))
    do, dS, dz = cotangents
    return _run_backward(given | saved, segment, do, dS, dz, _cut(arrays[1], arrays[2], interpret))


def _plain(arrays: Any, segment: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    from unisono_jax.ops import linear_attention

    q, k, v, S, z = arrays
    reset = None if segment is None else jnp.diff(segment, axis=1, prepend=0) > 0
    o, state = linear_attention.parallel(q, k, v, (S, z), reset, implementation="plain")
    return o.astype(v.dtype), *state


_run = operator(_forward_of, _backward_of, _plain)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, state: tuple[jax.Array, jax.Array], reset: jax.Array | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """q, k [B, T, H, K], v [B, T, H, V], state (S [B, H, K, V], z [B, H, K]), reset [B, T] or None → o in v's dtype, the final state
    in float32. q and k are rounded to v's dtype."""
    segment = None if reset is None else jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    S, z = (a.astype(jnp.float32) for a in state)
    o, S, z = _run(interpreted(), (q.astype(v.dtype), k.astype(v.dtype), v, S, z), segment)
    return o, (S, z)
