"""The selective scan and its gradient as sweeps over time in Pallas, the states in registers.

    h_t = a_t ∘ h_{t−1} + Δ_t u_t B_t,  a_t = exp(Δ_t A),  y_t = C_t h_t + D u_t

With G_t = C_t dy_t + a_{t+1} ∘ G_{t+1}, and W_t = a_t ∘ G_t ∘ h_{t−1}, which is what reaches Δ_t A:

    dC_t = Σ_d dy_t h_t,  dB_t = Σ_d Δ_t u_t G_t,  d(Δu)_t = G_t·B_t,  dΔ_t = W_t·A + u_t d(Δu)_t,  dA = Σ_t Δ_t W_t

A program owns BLOCK channels of one segment of one sequence; the state lies as [N, BLOCK], a channel a thread. Where that is too few
programs, time has several segments: each is swept from a state of 0 first, and since states are linear, h goes from segment to segment
with exp(A Σ Δ). The state before every TILE tokens is saved; a gradient's sweep makes those in between again, tile after tile, keeps one
in GROUP in a scratch of its own, and the rest in registers.

All sums and states are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from unisono_jax.kernels.operator import operator, outlined
from unisono_jax.ops.carry import carried
from unisono_jax.registry import interpreted

LOG2E = np.float32(np.log2(np.e))
BLOCK, TILE, GROUP = 16, 32, 4  # channels a program, tokens of which a state is saved once, and kept once
PROGRAMS = 768  # that there should be
SHORTEST = 512  # tokens that a segment has at least
Refs = Mapping[str, Any]
Arrays = dict[str, jax.Array]


class Cut(NamedTuple):
    """How a sweep is cut: channels a program, tokens a tile and a group, tiles a segment, segments a sequence."""

    block: int
    tile: int
    group: int
    tiles: int
    segments: int
    interpret: bool


Rows = list[dict[str, jax.Array]]  # of the tokens of a group, as they were read


def _read(refs: Refs, first: Any, cut: Cut, *names: str) -> Rows:
    """All loads of a group, before anything is stored: none of them then waits for another token."""
    return [{name: refs[name][first + j] if name == "reset" else refs[name][first + j, :] for name in names} for j in range(cut.group)]


def _names(refs: Refs, *names: str) -> tuple[str, ...]:
    return (*names, "reset") if "reset" in refs else names


def _wide(row: dict[str, jax.Array], *names: str) -> tuple[jax.Array, ...]:
    return tuple(row[name].astype(jnp.float32) for name in names)


def _decay(row: dict[str, jax.Array], a2: jax.Array) -> jax.Array:
    """What is left of a state at a token."""
    a = jnp.exp2(row["dt"].astype(jnp.float32)[None, :] * a2)
    return jnp.where(row["reset"] != 0, 0.0, a) if "reset" in row else a


def _moved(row: dict[str, jax.Array], a: jax.Array, h: jax.Array) -> jax.Array:
    u, dt, B = _wide(row, "u", "dt", "B")
    return a * h + B[:, None] * (dt * u)[None, :]


def _sweep(
    refs: Refs, cut: Cut, first: Any, many: Any, names: tuple[str, ...], group: Callable[..., Any], carry: Any, back: bool = False
) -> Any:
    """group(which, its rows, carry) for so many groups of tokens from `first` on, or back to it; the next one's are read meanwhile."""

    def at(i: Any) -> Any:
        which = jnp.minimum(i, many - 1)
        return many - 1 - which if back else which

    def one(i: Any, carry: Any) -> Any:
        rows, inner = carry
        ahead = _read(refs, first + at(i + 1) * cut.group, cut, *names)
        return ahead, group(at(i), rows, inner)

    return lax.fori_loop(0, many, one, (_read(refs, first + at(0) * cut.group, cut, *names), carry))[1]


def _ends(refs: Refs, cut: Cut) -> None:
    """What a segment makes of a state of 0, and Σ Δ."""
    a2, shape = refs["A"][...] * LOG2E, refs["end"].shape

    def group(_: Any, rows: Rows, carry: Any) -> Any:
        h, span = carry
        for row in rows:
            h, span = _moved(row, _decay(row, a2), h), span + row["dt"].astype(jnp.float32)
        return h, span

    zero = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[1:], jnp.float32)
    many = cut.tiles * cut.tile // cut.group
    refs["end"][...], refs["span"][...] = _sweep(refs, cut, 0, many, _names(refs, "u", "dt", "B"), group, zero)


def _forward(refs: Refs, cut: Cut) -> None:
    a2, D, groups = refs["A"][...] * LOG2E, refs["D"][...], cut.tile // cut.group

    def tile(n: Any, h: jax.Array) -> jax.Array:
        refs["saved"][n] = h

        def group(i: Any, rows: Rows, h: jax.Array) -> jax.Array:
            out = []
            for row in rows:
                h = _moved(row, _decay(row, a2), h)
                C, u = _wide(row, "C", "u")
                out.append((h * C[:, None]).sum(0) + D * u)
            for j, y in enumerate(out):
                refs["y"][n * cut.tile + i * cut.group + j, :] = y
            return h

        return _sweep(refs, cut, n * cut.tile, groups, _names(refs, "u", "dt", "B", "C"), group, h)

    refs["final"][...] = lax.fori_loop(0, cut.tiles, tile, refs["h"][...])


def _back_ends(refs: Refs, cut: Cut) -> None:
    """What a segment's outputs make of a gradient of 0 behind it."""
    a2 = refs["A"][...] * LOG2E

    def group(_: Any, rows: Rows, G: jax.Array) -> jax.Array:
        for row in reversed(rows):
            C, dy = _wide(row, "C", "dy")
            G = _decay(row, a2) * (G + C[:, None] * dy[None, :])
        return G

    many, zero = cut.tiles * cut.tile // cut.group, jnp.zeros(refs["end"].shape, jnp.float32)
    refs["end"][...] = _sweep(refs, cut, 0, many, _names(refs, "dt", "C", "dy"), group, zero, back=True)


def _backward(refs: Refs, cut: Cut) -> None:
    A, D, groups = refs["A"][...], refs["D"][...], cut.tile // cut.group
    a2, zero = A * LOG2E, jnp.zeros(A.shape, jnp.float32)

    def tile(n: Any, carry: Any) -> Any:
        order = cut.tiles - 1 - n
        first = order * cut.tile

        def ahead(i: Any, rows: Rows, h: jax.Array) -> jax.Array:
            refs["scratch"][i] = h
            for row in rows:
                h = _moved(row, _decay(row, a2), h)
            return h

        def back(i: Any, rows: Rows, carry: Any) -> Any:
            G, dA, dD = carry
            states, kept, out = [refs["scratch"][i]], [], []
            for row in rows:
                kept.append(_decay(row, a2))
                states.append(_moved(row, kept[-1], states[-1]))
            for j in reversed(range(cut.group)):
                dy, u, dt, B, C = _wide(rows[j], "dy", "u", "dt", "B", "C")
                G = G + C[:, None] * dy[None, :]
                to_C, to_B = (states[j + 1] * dy[None, :]).sum(1), (G * (dt * u)[None, :]).sum(1)
                to_gain = (G * B[:, None]).sum(0)
                G = kept[j] * G
                W = G * states[j]
                out.append((j, {"du": to_gain * dt + D * dy, "ddt": (W * A).sum(0) + u * to_gain, "dB": to_B, "dC": to_C}))
                dA, dD = dA + W * dt[None, :], dD + dy * u
            for j, slopes in out:
                for name, a in slopes.items():
                    refs[name][first + i * cut.group + j, :] = a.astype(refs[name].dtype)
            return G, dA, dD

        _sweep(refs, cut, first, groups, _names(refs, "u", "dt", "B"), ahead, refs["saved"][order])
        if not cut.interpret:
            plt.debug_barrier()
        carry = _sweep(refs, cut, first, groups, _names(refs, "u", "dt", "B", "C", "dy"), back, carry, back=True)
        if not cut.interpret:
            plt.debug_barrier()
        return carry

    first = refs["G"][...], zero, jnp.zeros(A.shape[1:], jnp.float32)
    refs["dh"][...], refs["dA"][...], refs["dD"][...] = lax.fori_loop(0, cut.tiles, tile, first)


CHANNELS, ROWS = ("u", "dt", "y", "dy", "du", "ddt"), ("B", "C")  # tokens [B, T, D] and [B, T, N]


def _launch(kernel: Callable[[Refs, Cut], None], cut: Cut, inputs: Arrays, outputs: Mapping[str, tuple[tuple[int, ...], Any]]) -> Arrays:
    """Run `kernel` for each block of channels of each segment; outputs: shapes and dtypes.

    By name, arrays are tokens [B, T, D], [B, T, N]; marks reset [B, T]; dB, dC [D / BLOCK, B, T, N]; parameters A [N, D], D [D];
    saved [B, tiles, N, D]; scratch [programs, groups, N, BLOCK]; of segments [B, G, N, D], [B, G, D].
    """
    batch, _whole, width = inputs["dt"].shape
    blocks, count, length, block = width // cut.block, cut.segments, cut.tiles * cut.tile, cut.block

    def at(p: Any) -> tuple[Any, Any, Any]:
        return p // (blocks * count), p // blocks % count, p % blocks

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name in CHANNELS:
            return pl.BlockSpec((None, length, block), at)
        if name in ROWS:
            return pl.BlockSpec((None, length, shape[2]), lambda p: (at(p)[0], at(p)[1], 0))
        if name == "reset":
            return pl.BlockSpec((None, length), lambda p: at(p)[:2])
        if name in ("dB", "dC"):
            return pl.BlockSpec((None, None, length, shape[3]), lambda p: (at(p)[2], *at(p)[:2], 0))
        if name == "A":
            return pl.BlockSpec((shape[0], block), lambda p: (0, at(p)[2]))
        if name == "D":
            return pl.BlockSpec((block,), lambda p: (at(p)[2],))
        if name == "saved":
            return pl.BlockSpec((None, cut.tiles, shape[2], block), lambda p: (at(p)[0], at(p)[1], 0, at(p)[2]))
        if name == "scratch":
            return pl.BlockSpec((None, *shape[1:]), lambda p: (p, 0, 0, 0))
        if name in ("span", "dD"):
            return pl.BlockSpec((None, None, block), at)
        return pl.BlockSpec((None, None, shape[2], block), lambda p: (*at(p)[:2], 0, at(p)[2]))

    def body(*refs: Any) -> None:
        kernel(dict(zip((*inputs, *outputs), refs, strict=True)), cut)

    found = pl.pallas_call(
        body,
        grid=(batch * count * blocks,),
        in_specs=[spec(name, a.shape) for name, a in inputs.items()],
        out_specs=[spec(name, shape) for name, (shape, _) in outputs.items()],
        out_shape=outlined(outputs.values(), next(iter(inputs.values()))),
        compiler_params=plt.CompilerParams(num_warps=max(1, cut.block // 32), num_stages=1),
        interpret=cut.interpret,
        name=kernel.__name__.strip("_"),
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


def _cut(batch: int, length: int, width: int, interpret: bool) -> Cut:
    """From the shape alone, so that a result's bits do not depend on the GPU."""
    count = max(1, min(-(-PROGRAMS // (batch * -(-width // BLOCK))), length // SHORTEST))
    tiles = -(-length // (count * TILE))
    return Cut(BLOCK, TILE, GROUP, tiles, -(-length // (tiles * TILE)), interpret)


def segments(batch: int, length: int, width: int) -> int:
    """How many parts of a sequence's time are swept side by side."""
    return _cut(batch, length, width, False).segments


def _padded(a: jax.Array, *sizes: int | None) -> jax.Array:
    """Zeros after the end of each axis, up to its size."""
    more = [(0, 0 if size is None else size - n) for size, n in zip(sizes, a.shape, strict=True)]
    return jnp.pad(a, more) if any(n for _, n in more) else a


def _given(u, dt, A, B, C, D, reset, cut: Cut) -> tuple[Arrays, Any]:
    """What kernels read, padded; and which segments [B, G] forget the state before them."""
    length, width, states = (
        cut.segments * cut.tiles * cut.tile,
        -(-u.shape[2] // cut.block) * cut.block,
        max(1, 1 << (A.shape[1] - 1).bit_length()),
    )
    given = {"u": _padded(u, None, length, width), "dt": _padded(dt, None, length, width), "A": _padded(A.T, states, width)}
    given |= {"B": _padded(B, None, length, states), "C": _padded(C, None, length, states), "D": _padded(D, width)}
    if reset is None:
        return given, None
    given["reset"] = _padded(reset.astype(jnp.int32), None, length)
    return given, given["reset"].reshape(len(u), cut.segments, -1).any(-1)


def _some(given: Arrays, *names: str) -> Arrays:
    return {name: given[name] for name in (*names, "reset") if name in given}


def _handed(own: jax.Array, span: jax.Array, A: jax.Array, first: jax.Array, forgets: Any, backwards: bool = False) -> jax.Array:
    """The state before each segment (G behind it, where time runs backwards) [B, G, N, D]."""
    order = slice(None, None, -1 if backwards else 1)
    decay = jnp.exp(span[:, order, None] * A)
    return carried(own[:, order], first, None if forgets is None else forgets[:, order], decay)[0][:, order]


def forward(interpret: bool, arrays: Any, reset: jax.Array | None) -> Any:
    """arrays: u, dt, A, B, C, D, state. → (y, final state), what the gradient needs: the state before each tile, Σ Δ of each segment."""
    u, dt, A, B, C, D, state = arrays
    (batch, length, width), states = u.shape, A.shape[1]
    cut = _cut(batch, length, width, interpret)
    given, forgets = _given(u, dt, A, B, C, D, reset, cut)
    N, whole = given["A"].shape
    h, span = _padded(jnp.swapaxes(state, 1, 2), None, N, whole), None
    segments = {"end": ((batch, cut.segments, N, whole), jnp.float32), "span": ((batch, cut.segments, whole), jnp.float32)}
    if cut.segments == 1:
        before = h[:, None]
    else:
        ends = _launch(_ends, cut, _some(given, "u", "dt", "A", "B"), segments)
        span = ends["span"]
        before = _handed(ends["end"], span, given["A"], h, forgets)
    outputs = {"y": (given["u"].shape, jnp.float32), "final": segments["end"]}
    outputs["saved"] = ((batch, cut.segments * cut.tiles, N, whole), jnp.float32)
    found = _launch(_forward, cut, _some(given, "u", "dt", "A", "B", "C", "D") | {"h": before}, outputs)
    final = jnp.swapaxes(found["final"][:, -1, :states, :width], 1, 2)
    return (found["y"][:, :length, :width], final), (found["saved"], span)


def _backward_of(interpret: bool, arrays: Any, reset: jax.Array | None, saved: Any, cotangents: Any) -> Any:
    u, dt, A, B, C, D, _ = arrays
    (batch, length, width), states = u.shape, A.shape[1]
    cut = _cut(batch, length, width, interpret)
    given, forgets = _given(u, dt, A, B, C, D, reset, cut)
    N, whole = given["A"].shape
    dy = _padded(cotangents[0], None, given["u"].shape[1], whole)
    G = _padded(jnp.swapaxes(cotangents[1], 1, 2), None, N, whole)
    shape = ((batch, cut.segments, N, whole), jnp.float32)
    if cut.segments == 1:
        behind = G[:, None]
    else:
        own = _launch(_back_ends, cut, _some(given, "dt", "A", "C") | {"dy": dy}, {"end": shape})["end"]
        behind = _handed(own, saved[1], given["A"], G, forgets, backwards=True)
    blocks = whole // cut.block
    outputs = {"du": (given["u"].shape, u.dtype), "ddt": (given["u"].shape, jnp.float32), "dh": shape, "dA": shape}
    outputs |= dict.fromkeys(("dB", "dC"), ((blocks, *given["B"].shape), jnp.float32))
    outputs |= {"dD": ((batch, cut.segments, whole), jnp.float32)}
    outputs["scratch"] = ((batch * cut.segments * blocks, cut.tile // cut.group, N, cut.block), jnp.float32)
    found = _launch(_backward, cut, {**given, "dy": dy, "saved": saved[0], "G": behind}, outputs)
    dB, dC = (found[name].sum(0)[:, :length, :states].astype(a.dtype) for name, a in (("dB", B), ("dC", C)))
    dA = found["dA"].sum((0, 1))[:states, :width].T
    du, ddt = (found[name][:, :length, :width] for name in ("du", "ddt"))
    return du, ddt, dA, dB, dC, found["dD"].sum((0, 1))[:width], jnp.swapaxes(found["dh"][:, 0, :states, :width], 1, 2)


def plain(arrays: Any, reset: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    from unisono_jax.ops import selective_scan

    return selective_scan.parallel(*arrays, reset=reset, implementation="plain")


_run = operator(forward, _backward_of, plain)


def scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    state: jax.Array,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """u, dt [B, T, D], A [D, N], B, C [B, T, N], D [D], state [B, D, N], reset [B, T] or None → y, the final state, in float32."""
    dt, A, D, state = (a.astype(jnp.float32) for a in (dt, A, D, state))
    return _run(interpreted(), (u, dt, A, B, C, D, state), reset)
