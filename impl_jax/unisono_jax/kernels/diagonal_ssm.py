"""The diagonal recurrence and its gradient as products of matrices in Pallas, a channel a program.

Of chunks of C tokens, the rows X [N, C] of a sequence, with tables of a channel that its e^{pΔA} make:

    H_{n+1} = F ∘ H_n + X_n intoᵀ,  Y = X kernel + H read

and with G_n = dY_n readᵀ + F̄ ∘ G_{n+1}, which is what reaches H_n, and down_n = G_{n+1}:

    dX = dY kernelᵀ + down into,  dkernel = Xᵀ dY,  dread = Hᵀ dY,  dinto = downᵀ X,  dF = Σ_n down_n ∘ H̄_n

A program owns a channel of up to SEQUENCES sequences: products for all chunks first, then the states from chunk to chunk, then products
again; what passes between them lies in memory. Where a chunk has resets, its products are made once for each of its parts.

All sums and states are float32. Products are of bfloat16 terms, three of a float32, which add up to it; what is too small for its digits
is left out.
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
from unisono_jax.ops.elementwise import dot, masked
from unisono_jax.registry import interpreted

SIZE = 64  # tokens a chunk
ROWS = 64  # chunks a product
SEQUENCES = 8  # of a program
AHEAD = 8  # chunks whose states are read before they are needed
WARPS, STAGES = 4, 1
Refs = Mapping[str, Any]
Arrays = dict[str, jax.Array]


class Cut(NamedTuple):
    """How a channel is cut: chunks a product, tiles of so many a sequence, sequences, sequences a program, pairs of a state, padded."""

    rows: int
    tiles: int
    batch: int
    sequences: int
    pairs: int
    interpret: bool

    @property
    def groups(self) -> int:
        return -(-self.batch // self.sequences)


def _cut(batch: int, chunks: int, numbers: int, interpret: bool) -> Cut:
    """From shapes alone, so that a result's bits do not depend on the GPU."""
    rows = min(ROWS, max(16, _power(chunks)))
    return Cut(rows, -(-chunks // rows), batch, min(SEQUENCES, _power(batch)), max(16, _power(numbers // 2)), interpret)


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def _terms(a: jax.Array, compiled: bool = True) -> list[jax.Array]:
    """Of bfloat16, which add up to a: one, or three of a float32. XLA, where it compiles this, must be kept from a shorter way."""
    if a.dtype == jnp.bfloat16:
        return [a]
    found = []
    for _ in range(3):
        found.append((a if compiled else lax.reduce_precision(a, 8, 7)).astype(jnp.bfloat16))
        a = a - found[-1].astype(jnp.float32)
    return found


def _dot(a: list[jax.Array], b: list[jax.Array], left: int = 1, right: int = 0, out: jax.Array | None = None) -> jax.Array:
    """`out` + two sums of terms contracted over these axes, but for products of terms that are too small for float32."""
    axes = (((left,), (right,)), ((), ()))
    for j in reversed(range(len(b))):
        for a_i in reversed(a[: 3 - j]):
            made = lax.dot_general(a_i, b[j], axes, preferred_element_type=jnp.float32)
            out = made if out is None else out + made
    assert out is not None
    return out


def _table(refs: Refs, name: str) -> list[jax.Array]:
    return [refs[name][j, ...] for j in range(3)]


def _parts(own: Any, out: jax.Array, add: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
    """add(where the tokens of a part are, out), for each of the parts that resets make of chunks."""
    if own is None:
        return add(None, out)
    return lax.fori_loop(0, jnp.max(own) + 1, lambda s, out: add(own == s, out), out)


def _kept(where: Any, a: jax.Array) -> jax.Array:
    return a if where is None else jnp.where(where, a, jnp.zeros((), a.dtype))


class _Tile(NamedTuple):
    """Rows of one sequence, and what their tokens may read: the part of each, which read the state before the chunk, and which go
    into that after it."""

    at: tuple[Any, Any]
    own: Any
    reads: Any
    leaves: Any


def _tiles(refs: Refs, cut: Cut, tile: Callable[[_Tile, Any], Any], carry: Any) -> Any:
    first = _first(cut)

    def one(i: Any, carry: Any) -> Any:
        b, n = (i, 0) if cut.tiles == 1 else (lax.div(i, jnp.int32(cut.tiles)), lax.rem(i, jnp.int32(cut.tiles)))
        at = first + b, pl.ds(n * cut.rows, cut.rows)
        if "own" not in refs:
            return tile(_Tile(at, None, None, None), carry)
        own = refs["own"][(*at, slice(None))]
        return tile(_Tile(at, own, own == 0, own == jnp.max(own, 1)[:, None]), carry)

    return lax.fori_loop(0, jnp.minimum(cut.sequences, cut.batch - first) * cut.tiles, one, carry)


def _first(cut: Cut) -> Any:
    """Of a program's sequences."""
    return pl.program_id(1) * cut.sequences


def _from_chunk_to_chunk(refs: Refs, cut: Cut, name: str, first: Any, chunk: Callable[..., Any], back: bool = False) -> Any:
    """chunk(which, its row of `name` as real and imaginary parts, whether its state goes on, carry) → what stands there instead."""
    batches, P, number = pl.ds(_first(cut), cut.sequences), cut.pairs, cut.rows * cut.tiles

    def group(i: Any, carry: Any) -> Any:
        read = []
        for j in range(AHEAD):
            n = number - 1 - (i * AHEAD + j) if back else i * AHEAD + j
            row = [refs[name][batches, n, part] for part in (pl.ds(0, P), pl.ds(P, P))]
            more = [refs["h"][batches, n, part] for part in (pl.ds(0, P), pl.ds(P, P))] if back else []
            read.append((n, row, more, refs["on"][batches, n] if "on" in refs else None))
        for n, row, more, on in read:
            new, carry = chunk(n, row, more, on, carry)
            refs[name][batches, n, pl.ds(0, P)], refs[name][batches, n, pl.ds(P, P)] = new
        return carry

    return lax.fori_loop(0, number // AHEAD, group, first)


def _barrier(cut: Cut) -> None:
    if not cut.interpret:
        plt.debug_barrier()


def _forward(refs: Refs, cut: Cut) -> None:
    P = cut.pairs
    fr, fi = refs["factor"][pl.ds(0, P)], refs["factor"][pl.ds(P, P)]
    batches = pl.ds(_first(cut), cut.sequences)
    asked = refs["chunk"][batches]

    into = _table(refs, "into")

    def enter(tile: _Tile, carry: Any) -> Any:
        x = _kept(tile.leaves, refs["x"][(*tile.at, slice(None))])
        refs["h"][(*tile.at, slice(None))] = _dot(_terms(x), into, 1, 1)
        return carry

    def chunk(n: Any, row: Any, _: Any, on: Any, carry: Any) -> Any:
        hr, hi, last_r, last_i = carry
        here = (asked == n)[:, None]
        last_r, last_i = jnp.where(here, hr, last_r), jnp.where(here, hi, last_i)
        kept = [fr * hr - fi * hi, fr * hi + fi * hr]
        if on is not None:
            kept = [jnp.where((on != 0)[:, None], a, 0.0) for a in kept]
        return (hr, hi), (kept[0] + row[0], kept[1] + row[1], last_r, last_i)

    def leave(tile: _Tile, carry: Any) -> Any:
        past: Any = None
        for part, table in zip(halves, read, strict=True):  # lest registers hold both at once
            past = _dot(_terms(refs["h"][(*tile.at, part)]), table, out=past)
        past = _kept(tile.reads, past)
        x = refs["x"][(*tile.at, slice(None))]
        refs["y"][(*tile.at, slice(None))] = _parts(tile.own, past, lambda s, out: out + _kept(s, _dot(_terms(_kept(s, x)), kernel)))
        return carry

    _tiles(refs, cut, enter, 0)
    _barrier(cut)
    h0 = refs["h0"][batches, pl.ds(0, P)], refs["h0"][batches, pl.ds(P, P)]
    *_, last_r, last_i = _from_chunk_to_chunk(refs, cut, "h", (*h0, *h0), chunk)
    refs["last"][batches, pl.ds(0, P)], refs["last"][batches, pl.ds(P, P)] = last_r, last_i
    _barrier(cut)
    halves = pl.ds(0, P), pl.ds(P, P)
    read, kernel = [[refs["read"][j, part, :] for j in range(3)] for part in halves], _table(refs, "kernel")
    _tiles(refs, cut, leave, 0)


def _backward(refs: Refs, cut: Cut) -> None:
    P = cut.pairs
    fr, fi = refs["factor"][pl.ds(0, P)], refs["factor"][pl.ds(P, P)]
    batches = pl.ds(_first(cut), cut.sequences)
    asked = refs["chunk"][batches]
    dlast = refs["dlast"][batches, pl.ds(0, P)], refs["dlast"][batches, pl.ds(P, P)]
    there = (_first(cut) + lax.broadcasted_iota(jnp.int32, (cut.sequences, P), 0)) < cut.batch

    read = _table(refs, "read")

    def enter(tile: _Tile, carry: Any) -> Any:
        dkernel, dread = carry
        at = (*tile.at, slice(None))
        dy = refs["dy"][at]
        past = _terms(_kept(tile.reads, dy))
        refs["down"][at] = _dot(past, read, 1, 1)
        h = refs["h"][at]  # read here, lest registers hold all at once
        dread = _dot(_terms(h), past, 0, 0, dread)
        x = refs["x"][at]
        return _parts(tile.own, dkernel, lambda s, out: _dot(_terms(_kept(s, x)), _terms(_kept(s, dy)), 0, 0, out)), dread

    def chunk(n: Any, row: Any, h: Any, on: Any, carry: Any) -> Any:
        gr, gi, dr, di = carry  # what reaches the state after the chunk
        here, into = (asked == n)[:, None], (gr, gi)
        if on is not None:
            gr, gi = (jnp.where((on != 0)[:, None], a, 0.0) for a in (gr, gi))
        dr = dr + jnp.where(there, gr * h[0] + gi * h[1], 0.0)
        di = di + jnp.where(there, gi * h[0] - gr * h[1], 0.0)
        gr, gi = fr * gr + fi * gi + row[0], fr * gi - fi * gr + row[1]
        return into, (gr + jnp.where(here, dlast[0], 0.0), gi + jnp.where(here, dlast[1], 0.0), dr, di)

    def leave(tile: _Tile, dinto: jax.Array) -> jax.Array:
        at = (*tile.at, slice(None))
        down = _terms(refs["down"][at])
        x = _terms(_kept(tile.leaves, refs["x"][at]))
        dinto = _dot(down, x, 0, 0, dinto)
        past = _kept(tile.leaves, _dot(down, into))
        dy = refs["dy"][at]
        dx = _parts(tile.own, past, lambda s, out: out + _kept(s, _dot(_terms(_kept(s, dy)), kernel, 1, 1)))
        refs["dx"][at] = dx.astype(refs["dx"].dtype)
        return dinto

    none = [jnp.zeros(refs[name].shape, jnp.float32) for name in ("dkernel", "dread", "dinto")]
    refs["dkernel"][...], refs["dread"][...] = _tiles(refs, cut, enter, (none[0], none[1]))
    _barrier(cut)
    zero = jnp.zeros((cut.sequences, P), jnp.float32)
    gr, gi, dr, di = _from_chunk_to_chunk(refs, cut, "down", (zero,) * 4, chunk, back=True)
    refs["dh0"][batches, pl.ds(0, P)], refs["dh0"][batches, pl.ds(P, P)] = gr, gi
    refs["dfactor"][pl.ds(0, P)], refs["dfactor"][pl.ds(P, P)] = dr.sum(0), di.sum(0)
    _barrier(cut)
    kernel, into = _table(refs, "kernel"), _table(refs, "into")
    refs["dinto"][...] = _tiles(refs, cut, leave, none[2])


SHARED = ("own", "on", "chunk")  # by all channels
PARTIAL = ("dfactor", "dkernel", "dread", "dinto")  # of each group of sequences


def _launch(kernel: Callable[[Refs, Cut], None], cut: Cut, inputs: Arrays, outputs: Mapping[str, tuple[tuple[int, ...], Any]]) -> Arrays:
    """Run `kernel` for each channel of each group of sequences; outputs: shapes and dtypes.

    By name, arrays are of channels [D, …], marks [B, …] shared by all, or sums of a group of sequences [D, groups, …].
    """

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name in SHARED:
            return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
        if name in PARTIAL:
            return pl.BlockSpec((None, None, *shape[2:]), lambda d, g: (d, g, *(0,) * (len(shape) - 2)))
        return pl.BlockSpec((None, *shape[1:]), lambda d, _: (d, *(0,) * (len(shape) - 1)))

    def body(*refs: Any) -> None:
        kernel(dict(zip((*inputs, *outputs), refs, strict=True)), cut)

    found = pl.pallas_call(
        body,
        grid=(len(inputs["x"]), cut.groups),
        in_specs=[spec(name, a.shape) for name, a in inputs.items()],
        out_specs=[spec(name, shape) for name, (shape, _) in outputs.items()],
        out_shape=outlined(outputs.values(), inputs["x"]),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=cut.interpret,
        name=f"diagonal{kernel.__name__}",
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


def _padded(a: jax.Array, *sizes: int | None) -> jax.Array:
    """Zeros after the end of each axis, up to its size."""
    more = [(0, 0 if size is None else size - n) for size, n in zip(sizes, a.shape, strict=True)]
    return jnp.pad(a, more) if any(n for _, n in more) else a


def _by_channel(a: jax.Array, cut: Cut, size: int) -> jax.Array:
    """[B, T, D] → [D, B, N, C]."""
    number = cut.rows * cut.tiles
    a = jnp.transpose(_padded(a, None, number * size, None), (2, 0, 1))
    return a.reshape(*a.shape[:2], number, size)


def _by_token(a: jax.Array, length: int) -> jax.Array:
    """[D, B, N, C] → [B, T, D]."""
    return jnp.transpose(a.reshape(*a.shape[:2], -1), (1, 2, 0))[:, :length]


def _paired(a: jax.Array, pairs: int, axis: int) -> jax.Array:
    """An axis of 2P, all real parts and then all imaginary ones, with zeros after each up to `pairs`."""
    a = jnp.moveaxis(a, axis, -1)
    a = a.reshape(*a.shape[:-1], 2, -1)
    a = _padded(a, *(None,) * (a.ndim - 1), pairs)
    return jnp.moveaxis(a.reshape(*a.shape[:-2], -1), -1, axis)


def _unpaired(a: jax.Array, numbers: int, axis: int) -> jax.Array:
    a = jnp.moveaxis(a, axis, -1)
    a = a.reshape(*a.shape[:-1], 2, -1)[..., : numbers // 2]
    return jnp.moveaxis(a.reshape(*a.shape[:-2], -1), -1, axis)


def _given(arrays: Any, marks: Any, interpret: bool) -> tuple[Arrays, Cut, int]:
    """What both kernels read; how they are cut; sequences, padded."""
    u, kernel, into, read, factor, _ = arrays
    chunk, segment = marks
    size = kernel.shape[1]
    cut = _cut(u.shape[0], -(-u.shape[1] // size), factor.shape[1], interpret)
    whole = cut.groups * cut.sequences
    tables = {"kernel": kernel, "into": _paired(into, cut.pairs, 1), "read": _paired(read, cut.pairs, 1)}
    given = {"x": _by_channel(u, cut, size), "factor": _paired(factor, cut.pairs, 1)}
    given |= {name: jnp.stack(_terms(a, False), 1) for name, a in tables.items()}
    given["chunk"] = _padded(chunk.astype(jnp.int32), whole)
    if segment is not None:
        number = cut.rows * cut.tiles
        behind = number * size - segment.shape[1]
        segment = jnp.pad(segment, ((0, whole - len(segment)), (0, behind)), mode="edge").reshape(whole, number, size)
        before = jnp.concatenate([jnp.zeros((whole, 1), segment.dtype), segment[:, :-1, -1]], 1)  # that each chunk continues
        given["own"] = segment - before[..., None]
        given["on"] = (given["own"][..., -1] == 0).astype(jnp.int32)
    return given, cut, whole


def _forward_of(interpret: bool, arrays: Any, marks: Any) -> Any:
    u, _, _, _, factor, h0 = arrays
    given, cut, whole = _given(arrays, marks, interpret)
    x = given["x"]
    given["h0"] = _padded(jnp.swapaxes(_paired(h0, cut.pairs, 2), 0, 1), None, whole, None)
    outputs = {"y": (x.shape, jnp.float32), "last": (given["h0"].shape, jnp.float32)}
    outputs["h"] = ((x.shape[0], whole, x.shape[2], 2 * cut.pairs), jnp.float32)
    found = _launch(_forward, cut, given, outputs)
    last = _unpaired(jnp.swapaxes(found["last"][:, : len(u)], 0, 1), factor.shape[1], 2)
    return (_by_token(found["y"], u.shape[1]), last), found["h"]


def _backward_of(interpret: bool, arrays: Any, marks: Any, saved: Any, cotangents: Any) -> Any:
    u, kernel, *_, factor, _ = arrays
    given, cut, whole = _given(arrays, marks, interpret)
    numbers, x = factor.shape[1], given["x"]
    dy = _by_channel(cotangents[0], cut, kernel.shape[1])
    dlast = _padded(jnp.swapaxes(_paired(cotangents[1], cut.pairs, 2), 0, 1), None, whole, None)
    outputs: dict[str, Any] = {"dx": (x.shape, u.dtype), "dh0": (dlast.shape, jnp.float32), "down": (saved.shape, jnp.float32)}
    for name, of in (("dfactor", "factor"), ("dkernel", "kernel"), ("dread", "read"), ("dinto", "into")):
        outputs[name] = ((len(x), cut.groups, *given[of].shape[-1 if of == "factor" else -2 :]), jnp.float32)
    found = _launch(_backward, cut, given | {"h": saved, "dy": dy, "dlast": dlast}, outputs)
    dfactor, dkernel, dread, dinto = (found[name].sum(1) for name in PARTIAL)
    dh0 = _unpaired(jnp.swapaxes(found["dh0"][:, : len(u)], 0, 1), numbers, 2)
    to_tables = dkernel, _unpaired(dinto, numbers, 1), _unpaired(dread, numbers, 1), _unpaired(dfactor, numbers, 1)
    return _by_token(found["dx"], u.shape[1]), *to_tables, dh0


def plain(arrays: Any, marks: Any) -> tuple[jax.Array, jax.Array]:
    """The same in plain operations, a chunk after the other."""
    u, kernel, into, read, factor, h0 = arrays
    chunk, segment = marks
    (batch, length, width), size, pairs = u.shape, kernel.shape[1], factor.shape[1] // 2
    number = -(-length // size)
    x = _padded(u.astype(kernel.dtype), None, number * size, None).reshape(batch, number, size, width)
    own = jnp.zeros((batch, number, size), jnp.int32)
    if segment is not None:
        segment = jnp.pad(segment, ((0, 0), (0, number * size - length)), mode="edge").reshape(own.shape)
        own = segment - jnp.concatenate([jnp.zeros((batch, 1), segment.dtype), segment[:, :-1, -1]], 1)[..., None]
    fr, fi = factor[:, :pairs], factor[:, pairs:]

    def step(h: jax.Array, at_n: Any) -> Any:
        x, own = at_n  # [B, C, D], [B, C]
        last = own == own[:, -1:]
        same = (own[:, :, None] == own[:, None, :])[..., None]  # [B, j, t, 1]
        y = (jnp.where(same, jnp.moveaxis(kernel, 0, -1), 0) * x[:, :, None]).sum(1)
        y = y + masked(own == 0, dot("bdp,dpt->btd", h, read))[0]
        (goes,) = masked(own[:, -1] == 0, h)
        kept = jnp.concatenate([fr * goes[..., :pairs] - fi * goes[..., pairs:], fr * goes[..., pairs:] + fi * goes[..., :pairs]], -1)
        return kept + dot("bjd,dpj->bdp", masked(last, x)[0], into), (y, h)

    _, (y, h) = lax.scan(step, h0, (jnp.swapaxes(x, 0, 1), jnp.swapaxes(own, 0, 1)))
    return jnp.swapaxes(y, 0, 1).reshape(batch, -1, width)[:, :length], h[chunk, jnp.arange(batch)]


_run = operator(_forward_of, _backward_of, plain)


def scan(
    u: jax.Array,
    kernel: jax.Array,
    into: jax.Array,
    read: jax.Array,
    factor: jax.Array,
    state: jax.Array,
    chunk: jax.Array,
    segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """u [B, T, D], tables of chunks of C tokens, kernel [D, C, C] (key by query), into and read [D, 2P, C], factor [D, 2P], the
    state before [B, D, 2P], all real parts and then all imaginary ones; chunk [B], segment [B, T] or None: how many resets came
    before → y [B, T, D], the state before `chunk` [B, D, 2P], in float32."""
    return _run(interpreted(), (u, kernel, into, read, factor, state), (chunk, segment))
