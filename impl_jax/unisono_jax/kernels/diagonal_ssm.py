"""The diagonal recurrence and its gradient as products of matrices in Pallas, a channel a program.

Of chunks of C tokens, the rows X [N, C] of a sequence, with tables of a channel that its e^{pΔA} make:

    H_{n+1} = F ∘ H_n + X_n intoᵀ,  Y = X kernel + H read

and with G_n = dY_n readᵀ + F̄ ∘ G_{n+1}, which is what reaches H_n, and down_n = G_{n+1}:

    dX = dY kernelᵀ + down into,  dkernel = Xᵀ dY,  dread = Hᵀ dY,  dinto = downᵀ X,  dF = Σ_n down_n ∘ H̄_n

A program owns a channel of up to SEQUENCES sequences. Forward, these are cut in segments: a row of its products is a segment, and all of
these go from chunk to chunk side by side, their states in registers. First from nothing, which tells what a segment adds to the state;
that goes from segment to segment, through memory; then again, from the states that are right. Back, where registers do not hold that:
products for all chunks first, then the states from chunk to chunk, then products again; what passes between them lies in memory. Where a
chunk has resets, its products are made once for each of its parts.

All sums and states are float32. Products are of bfloat16 terms, three of a float32, which add up to it; what is too small for its digits
is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from unisono_jax.kernels.diagonal_sweeps import Cut, Refs, backward, forward
from unisono_jax.kernels.operator import operator, outlined
from unisono_jax.ops.elementwise import dot, masked
from unisono_jax.registry import interpreted

SIZE = 64  # tokens a chunk
ROWS = 64  # segments side by side
LEAST = 16  # rows of a product
SEQUENCES = 8  # of a program
AHEAD = 8  # segments whose states are read before they are needed
WARPS, STAGES = 4, {"forward": 3, "backward": 1}
Arrays = dict[str, jax.Array]


def _cut(batch: int, chunks: int, numbers: int, interpret: bool) -> Cut:
    """From shapes alone, so that a result's bits do not depend on the GPU."""
    tile = min(ROWS, max(LEAST, _power(chunks)))
    tiles = -(-chunks // tile)
    sequences = min(SEQUENCES, _power(batch))
    segments = max(min(ROWS // sequences, _power(chunks)), LEAST // sequences)
    steps = tile * tiles // segments
    pairs = max(16, _power(numbers // 2))
    return Cut(sequences, segments, steps, batch, -(-batch // sequences), pairs, tile, tiles, AHEAD, interpret)


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


SHARED = ("own", "on", "through", "chunk")  # by all channels
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
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES[kernel.__name__]),
        interpret=cut.interpret,
        name=f"diagonal_{kernel.__name__}",
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


def _padded(a: jax.Array, *sizes: int | None) -> jax.Array:
    """Zeros after the end of each axis, up to its size."""
    more = [(0, 0 if size is None else size - n) for size, n in zip(sizes, a.shape, strict=True)]
    return jnp.pad(a, more) if any(n for _, n in more) else a


def _by_channel(a: jax.Array, cut: Cut, size: int) -> jax.Array:
    """[B, T, D] → [D, B, N, C], padded."""
    a = jnp.transpose(_padded(a, cut.whole, cut.number * size, None), (2, 0, 1))
    return a.reshape(*a.shape[:2], cut.number, size)


def _by_token(a: jax.Array, cut: Cut, like: jax.Array) -> jax.Array:
    """[D, B, N, C], however these are cut → [B, T, D]."""
    return jnp.transpose(a.reshape(len(a), cut.whole, -1), (1, 2, 0))[: like.shape[0], : like.shape[1]]


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


def _given(arrays: Any, marks: Any, interpret: bool) -> tuple[Arrays, Cut]:
    """What both kernels read; how they are cut."""
    u, kernel, into, read, factor, _ = arrays
    chunk, segment = marks
    size = kernel.shape[1]
    cut = _cut(u.shape[0], -(-u.shape[1] // size), factor.shape[1], interpret)
    given = {"x": _by_channel(u, cut, size), "factor": _paired(factor, cut.pairs, 1), "kernel": kernel}
    given |= {"into": _paired(into, cut.pairs, 1), "read": _paired(read, cut.pairs, 1)}
    given["chunk"] = _padded(chunk.astype(jnp.int32), cut.whole)
    if segment is not None:
        behind = cut.number * size - segment.shape[1]
        segment = jnp.pad(segment, ((0, cut.whole - len(segment)), (0, behind)), mode="edge").reshape(cut.whole, -1, size)
        before = jnp.concatenate([jnp.zeros((cut.whole, 1), segment.dtype), segment[:, :-1, -1]], 1)  # that each chunk continues
        given["own"] = segment - before[..., None]
        given["on"] = (given["own"][..., -1] == 0).astype(jnp.int32)
    return given, cut


def _states(h: jax.Array, cut: Cut) -> jax.Array:
    """[B, D, 2P] → [D, B, 2P], padded."""
    return _padded(jnp.swapaxes(_paired(h, cut.pairs, 2), 0, 1), None, cut.whole, None)


def _forward_of(interpret: bool, arrays: Any, marks: Any, saves: bool = True) -> Any:
    u, _, _, _, factor, h0 = arrays
    given, cut = _given(arrays, marks, interpret)
    given["h0"], shape = _states(h0, cut), given["x"].shape
    rows = cut.whole * cut.segments  # of all groups
    x = given["x"] = given["x"].reshape(shape[0], rows, cut.steps, shape[-1])
    if "own" in given:
        given["own"], given["on"] = (given[name].reshape(rows, cut.steps, *given[name].shape[2:]) for name in ("own", "on"))
        given["through"] = given["on"].min(1)
    outputs: dict[str, Any] = {"y": (x.shape, jnp.float32)}
    outputs |= dict.fromkeys(("last", "segments"), ((len(x), rows, 2 * cut.pairs), jnp.float32))
    if saves:
        outputs["h"] = ((*x.shape[:3], 2 * cut.pairs), jnp.float32)
    found = _launch(forward, cut, given, outputs)
    asked = jnp.arange(len(u)) * cut.segments + marks[0] // cut.steps
    last = _unpaired(jnp.swapaxes(found["last"][:, asked], 0, 1), factor.shape[1], 2)
    return (_by_token(found["y"], cut, u), last), found.get("h")


def _backward_of(interpret: bool, arrays: Any, marks: Any, saved: Any, cotangents: Any) -> Any:
    u, kernel, *_, factor, _ = arrays
    given, cut = _given(arrays, marks, interpret)
    numbers, x = factor.shape[1], given["x"]
    dy, dlast = _by_channel(cotangents[0], cut, kernel.shape[1]), _states(cotangents[1], cut)
    outputs: dict[str, Any] = {"dx": (x.shape, u.dtype), "dh0": (dlast.shape, jnp.float32)}
    outputs["down"] = ((*x.shape[:3], 2 * cut.pairs), jnp.float32)
    saved = saved.reshape(outputs["down"][0])
    for name in PARTIAL:
        outputs[name] = ((len(x), cut.groups, *given[name[1:]].shape[1:]), jnp.float32)
    found = _launch(backward, cut, given | {"h": saved, "dy": dy, "dlast": dlast}, outputs)
    dfactor, dkernel, dread, dinto = (found[name].sum(1) for name in PARTIAL)
    dh0 = _unpaired(jnp.swapaxes(found["dh0"][:, : len(u)], 0, 1), numbers, 2)
    to_tables = dkernel, _unpaired(dinto, numbers, 1), _unpaired(dread, numbers, 1), _unpaired(dfactor, numbers, 1)
    return _by_token(found["dx"], cut, u), *to_tables, dh0


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


_run = operator(_forward_of, _backward_of, plain, lambda *given: _forward_of(*given, saves=False)[0])


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
