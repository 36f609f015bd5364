"""What the kernels of the diagonal recurrence do with a channel (diagonal_ssm.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

Refs = Mapping[str, Any]
Pair = tuple[jax.Array, jax.Array]  # real and imaginary parts


class Cut(NamedTuple):
    """How a channel is cut: sequences a program, segments a sequence, chunks a segment; sequences in all, groups of them; pairs of a
    state, padded; on the way back chunks a product, tiles of so many; states that are read before they are needed."""

    sequences: int
    segments: int
    steps: int
    batch: int
    groups: int
    pairs: int
    tile: int
    tiles: int
    ahead: int
    interpret: bool

    @property
    def rows(self) -> int:
        return self.sequences * self.segments

    @property
    def number(self) -> int:
        """Chunks of a sequence."""
        return self.segments * self.steps

    @property
    def whole(self) -> int:
        """Sequences, padded."""
        return self.groups * self.sequences


def _terms(a: jax.Array, number: int = 3) -> list[jax.Array]:
    """Of bfloat16, which add up to a: one, or three of a float32."""
    if a.dtype == jnp.bfloat16:
        return [a]
    found = []
    for _ in range(number):
        found.append(a.astype(jnp.bfloat16))
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


def _halves(cut: Cut) -> tuple[Any, Any]:
    """Where real and imaginary parts are."""
    return pl.ds(0, cut.pairs), pl.ds(cut.pairs, cut.pairs)


def _at(rows: jax.Array, cut: Cut, half: int) -> tuple[jax.Array, jax.Array]:
    """Of these rows, the real or the imaginary parts."""
    column = half * cut.pairs + lax.broadcasted_iota(jnp.int32, (len(rows), cut.pairs), 1)
    return jnp.broadcast_to(rows[:, None], column.shape), column


def _tables(refs: Refs, cut: Cut, name: str) -> list[list[jax.Array]]:
    """Of real and of imaginary parts, as terms."""
    return [_terms(refs[name][part, :]) for part in _halves(cut)]


def _parts(own: Any, out: jax.Array, add: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
    """add(where the tokens of a part are, out), for each of the parts that resets make of chunks."""
    if own is None:
        return add(None, out)
    return lax.fori_loop(0, jnp.max(own) + 1, lambda s, out: add(own == s, out), out)


def _kept(where: Any, a: jax.Array) -> jax.Array:
    return a if where is None else jnp.where(where, a, jnp.zeros((), a.dtype))


def _first(cut: Cut) -> Any:
    """Of a program's sequences."""
    return pl.program_id(1) * cut.sequences


def _barrier(cut: Cut) -> None:
    if not cut.interpret:
        plt.debug_barrier()


class _Tile(NamedTuple):
    """A chunk of each row, and what its tokens may read: the part of each, which read the state before the chunk, and which go into
    that after it; whether that state goes on [rows, 1]."""

    at: tuple[Any, ...]
    own: Any = None
    reads: Any = None
    leaves: Any = None
    on: Any = None


class _Rows(NamedTuple):
    """Of a program: where they are, the sequence and the segment of each [rows], and the chunk whose state is asked for."""

    all: Any
    sequence: jax.Array
    segment: jax.Array
    asked: Any

    @classmethod
    def of(cls, refs: Refs, cut: Cut) -> _Rows:
        row = lax.broadcasted_iota(jnp.int32, (cut.rows,), 0)
        sequence = _first(cut) + lax.div(row, jnp.int32(cut.segments))
        segment = lax.rem(row, jnp.int32(cut.segments))
        return cls(pl.ds(pl.program_id(1) * cut.rows, cut.rows), sequence, segment, refs["chunk"][sequence])

    def tile(self, refs: Refs, j: Any) -> _Tile:
        at = self.all, j, slice(None)
        if "own" not in refs:
            return _Tile(at)
        own = refs["own"][at]
        return _Tile(at, own, own == 0, own == jnp.max(own, 1)[:, None], (refs["on"][self.all, j] != 0)[:, None])

    def here(self, cut: Cut, j: Any) -> jax.Array:
        """Whether chunk j of a row is that whose state is asked for [rows, 1]."""
        return (self.asked == self.segment * cut.steps + j)[:, None]


def _turned(f: Pair, h: Pair, tile: _Tile | None = None) -> Pair:
    """F ∘ H; nothing where a state does not go on."""
    (fr, fi), (hr, hi) = f, h
    if tile is not None and tile.on is not None:
        hr, hi = (jnp.where(tile.on, a, 0.0) for a in (hr, hi))
    return fr * hr - fi * hi, fr * hi + fi * hr


def _segments(refs: Refs, cut: Cut, own: Pair, first: Pair) -> Pair:
    """States that segments begin with [rows, P], from what each adds; `first` [sequences, P]."""
    rows, halves = pl.ds(pl.program_id(1) * cut.rows, cut.rows), _halves(cut)
    for part, a in zip(halves, own, strict=True):
        refs["segments"][rows, part] = a
    factor = refs["factor"][halves[0]], refs["factor"][halves[1]]
    whole: Any = None  # F^steps
    for bit in bin(cut.steps)[2:]:
        whole = factor if whole is None else _turned(whole, whole)
        whole = _turned(whole, factor) if bit == "1" and whole is not factor else whole
    _barrier(cut)
    begins = pl.program_id(1) * cut.rows + lax.broadcasted_iota(jnp.int32, (cut.sequences,), 0) * cut.segments
    ahead = min(cut.ahead, cut.segments)

    def group(i: Any, carry: Pair) -> Pair:
        read = []
        for k in range(ahead):
            n = i * ahead + k
            on = (refs["through"][begins + n] != 0)[:, None] if "through" in refs else None
            at = [_at(begins + n, cut, part) for part in range(2)]
            read.append((at, tuple(refs["segments"][where] for where in at), on))
        for at, added, on in read:
            for where, a in zip(at, carry, strict=True):
                refs["segments"][where] = a
            kept = _turned(whole, carry, _Tile((), on=on))
            carry = kept[0] + added[0], kept[1] + added[1]
        return carry

    lax.fori_loop(0, cut.segments // ahead, group, first)
    _barrier(cut)
    return refs["segments"][rows, halves[0]], refs["segments"][rows, halves[1]]


def forward(refs: Refs, cut: Cut) -> None:
    halves, rows = _halves(cut), _Rows.of(refs, cut)
    factor = refs["factor"][halves[0]], refs["factor"][halves[1]]
    batches = pl.ds(_first(cut), cut.sequences)
    into = _tables(refs, cut, "into")

    def after(tile: _Tile, x: jax.Array, h: Pair) -> Pair:
        kept, terms = _turned(factor, h, tile), _terms(_kept(tile.leaves, x))
        return _dot(terms, into[0], 1, 1, kept[0]), _dot(terms, into[1], 1, 1, kept[1])

    def enter(j: Any, h: Pair) -> Pair:
        tile = rows.tile(refs, j)
        return after(tile, refs["x"][tile.at], h)

    def leave(j: Any, h: Pair) -> Pair:
        tile = rows.tile(refs, j)
        for part, a in zip(halves, h, strict=True):
            if "h" in refs:
                refs["h"][rows.all, j, part] = a
            plt.store(refs["last"].at[rows.all, part], a, mask=jnp.broadcast_to(rows.here(cut, j), a.shape))
        past: Any = None
        for a, table in zip(h, read, strict=True):
            past = _dot(_terms(a), table, out=past)
        x = refs["x"][tile.at]
        y = _parts(tile.own, _kept(tile.reads, past), lambda s, out: _added(s, out, _terms(_kept(s, x)), kernel))
        refs["y"][tile.at] = y
        return after(tile, x, h)

    none = jnp.zeros((cut.rows, cut.pairs), jnp.float32)
    added = lax.fori_loop(0, cut.steps, enter, (none, none))
    first = _segments(refs, cut, added, (refs["h0"][batches, halves[0]], refs["h0"][batches, halves[1]]))
    read, kernel = _tables(refs, cut, "read"), _terms(refs["kernel"][...])
    lax.fori_loop(0, cut.steps, leave, first)


def _added(where: Any, out: jax.Array, a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    return _dot(a, b, out=out) if where is None else out + _kept(where, _dot(a, b))


class _Span(NamedTuple):
    """Rows of one sequence, and what their tokens may read: the part of each, which read the state before the chunk, and which go
    into that after it."""

    at: tuple[Any, Any]
    own: Any
    reads: Any
    leaves: Any


def _spans(refs: Refs, cut: Cut, tile: Callable[[_Span, Any], Any], carry: Any) -> Any:
    first = _first(cut)

    def one(i: Any, carry: Any) -> Any:
        b, n = (i, 0) if cut.tiles == 1 else (lax.div(i, jnp.int32(cut.tiles)), lax.rem(i, jnp.int32(cut.tiles)))
        at = first + b, pl.ds(n * cut.tile, cut.tile)
        if "own" not in refs:
            return tile(_Span(at, None, None, None), carry)
        own = refs["own"][(*at, slice(None))]
        return tile(_Span(at, own, own == 0, own == jnp.max(own, 1)[:, None]), carry)

    return lax.fori_loop(0, jnp.minimum(cut.sequences, cut.batch - first) * cut.tiles, one, carry)


def _back(refs: Refs, cut: Cut, first: Any, chunk: Callable[..., Any]) -> Any:
    """From chunk to chunk: chunk(which, its row as real and imaginary parts, its state, whether that goes on, carry) → what stands there
    instead."""
    batches, P, number = pl.ds(_first(cut), cut.sequences), cut.pairs, cut.number

    def group(i: Any, carry: Any) -> Any:
        read = []
        for j in range(cut.ahead):
            n = number - 1 - (i * cut.ahead + j)
            row, h = ([refs[name][batches, n, part] for part in (pl.ds(0, P), pl.ds(P, P))] for name in ("down", "h"))
            read.append((n, row, h, refs["on"][batches, n] if "on" in refs else None))
        for n, row, h, on in read:
            new, carry = chunk(n, row, h, on, carry)
            refs["down"][batches, n, pl.ds(0, P)], refs["down"][batches, n, pl.ds(P, P)] = new
        return carry

    return lax.fori_loop(0, number // cut.ahead, group, first)


def backward(refs: Refs, cut: Cut) -> None:
    P = cut.pairs
    fr, fi = refs["factor"][pl.ds(0, P)], refs["factor"][pl.ds(P, P)]
    batches = pl.ds(_first(cut), cut.sequences)
    asked = refs["chunk"][batches]
    dlast = refs["dlast"][batches, pl.ds(0, P)], refs["dlast"][batches, pl.ds(P, P)]
    there = (_first(cut) + lax.broadcasted_iota(jnp.int32, (cut.sequences, P), 0)) < cut.batch

    read = _terms(refs["read"][...])

    def enter(tile: _Span, carry: Any) -> Any:
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

    def leave(tile: _Span, dinto: jax.Array) -> jax.Array:
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
    refs["dkernel"][...], refs["dread"][...] = _spans(refs, cut, enter, (none[0], none[1]))
    _barrier(cut)
    zero = jnp.zeros((cut.sequences, P), jnp.float32)
    gr, gi, dr, di = _back(refs, cut, (zero,) * 4, chunk)
    refs["dh0"][batches, pl.ds(0, P)], refs["dh0"][batches, pl.ds(P, P)] = gr, gi
    refs["dfactor"][pl.ds(0, P)], refs["dfactor"][pl.ds(P, P)] = dr.sum(0), di.sum(0)
    _barrier(cut)
    kernel, into = _terms(refs["kernel"][...]), _terms(refs["into"][...])
    refs["dinto"][...] = _spans(refs, cut, leave, none[2])
