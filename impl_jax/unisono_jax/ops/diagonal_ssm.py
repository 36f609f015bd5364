"""S4D: per channel, N/2 complex states that turn and decay at rates of their own (Gu et al. 2022, eqs 2, 4 and 5), B = 1.

h_t = e^{ΔA} h_{t−1} + (e^{ΔA} − 1) / A · u_t (zero-order hold),  y_t = 2 Re(Σ_n C_n h_{t,n}) + D u_t.

Complex numbers are pairs of reals in a last axis of 2, in float32 too: no framework, file or graph then needs complex dtypes.
e^{ΔA} − 1 is computed without cancellation: ΔA may be as small as 1e-3.

Shapes, P = N/2: u [B, T, D], dt (Δ) and D [D], A and C [D, P, 2], state [B, D, P, 2], reset and valid [B, T] bool or None.
Each form returns (y [B, T, D], final state), float32 or wider. y is 0 where a token is not valid.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from unisono_spec.contract.shapes import shaped

from unisono_jax.ops.carry import chunk_length, chunks, joined
from unisono_jax.ops.elementwise import dot, masked, restarted, widened
from unisono_jax.ops.fold import fold
from unisono_jax.ops.packing import packing, segments, take
from unisono_jax.registry import chosen

RADIX = 8  # terms of a sum of `_summed`
LEAST = 128  # tokens of a chunk on a GPU, where fewer and larger products are faster; with resets the convolution is no product


def discretised(dt: jax.Array, A: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """e^{ΔA}, e^{ΔA} − 1 and (e^{ΔA} − 1) / A, each [D, P, 2]."""
    x, y = dt[:, None] * A[..., 0], dt[:, None] * A[..., 1]  # ΔA = x + iy
    real = jnp.expm1(x) * jnp.cos(y) - 2 * jnp.square(jnp.sin(y / 2))  # of e^{x+iy} − 1, since cos y − 1 = −2 sin²(y/2)
    factor = jnp.stack([jnp.exp(x) * jnp.cos(y), jnp.exp(x) * jnp.sin(y)], -1)
    change = jnp.stack([real, factor[..., 1]], -1)
    near = (jnp.square(x) + jnp.square(y) < jnp.finfo(A.dtype).eps)[..., None]  # where |A|² may underflow
    safe = jnp.where(near, jnp.ones((), A.dtype), A)
    over = safe * jnp.array([1, -1], A.dtype) / jnp.square(safe).sum(-1, keepdims=True)  # 1 / A
    z, one = jnp.stack([x, y], -1), jnp.array([1, 0], A.dtype)
    series = dt[:, None, None] * (one + times(z, one + z / 3) / 2)
    return factor, change, jnp.where(near, series, times(change, over))


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """The complex product of pairs [..., 2]."""
    real, imaginary = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1], a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
    return jnp.stack([real, imaginary], -1)


@shaped
def step(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    C: jax.Array,
    D: jax.Array,
    state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token: u [B, D], reset and valid [B]."""
    u, dt, A, C, D, state = widened(*masked(valid, u), dt, A, C, D, state)
    return _step(u, *discretised(dt, A), C, D, state, reset, valid)


@shaped
def recurrent(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    C: jax.Array,
    D: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    u, dt, A, C, D, state = widened(*masked(valid, u), dt, A, C, D, initial_state)
    dynamics = discretised(dt, A)  # the same at every token
    return fold(lambda u, *rest: _step(u, *dynamics, C, D, *rest), (u,), state, reset, valid)


def _step(
    u: jax.Array,
    factor: jax.Array,
    change: jax.Array,
    gain: jax.Array,
    C: jax.Array,
    D: jax.Array,
    state: jax.Array,
    reset: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    if reset is not None:
        (state,) = masked(~reset, state)
    # a slow turn is rounded to the spacing of numbers near 1, the same at every token: what it lacks to 1 has more digits
    slow = jnp.square(factor).sum(-1, keepdims=True) > 0.25
    new = jnp.where(slow, state + times(change, state), times(factor, state)) + gain * u[..., None, None]
    y = 2 * times(C, new)[..., 0].sum(-1) + D * u
    return (y, new) if valid is None else (masked(valid, y)[0], jnp.where(valid[:, None, None, None], new, state))


@shaped
def parallel(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    C: jax.Array,
    D: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The convolution with the kernel 2 Re(C e^{pΔA} (e^{ΔA} − 1)/A), p valid tokens back, inside chunks; a carry between them.

    Valid tokens are moved together first: the kernel is then one Toeplitz matrix [C, C] a channel, and all work is matmuls.
    """
    batch, length, width = u.shape
    initial_state = restarted(reset, initial_state)
    widest = jnp.result_type(u, *(a for a in (dt, A, C, D, initial_state) if a.dtype == jnp.float64))
    if chosen(implementation, "diagonal_ssm", widest, {"P": A.shape[1]}, u.size) != "plain":
        return _by_kernel(u, dt, A, C, D, initial_state, reset, valid)
    least = LEAST if reset is None and jax.default_backend() == "gpu" else 1
    size, pairs = chunk_length(max(chunk_size, least), length), 2 * A.shape[1]
    u, dt, A, C, D, h0 = widened(*masked(valid, u), dt, A, C, D, initial_state)
    tokens, segment = packing(valid, batch, length), segments(reset, batch, length)
    x, now = chunks(tokens.pack(u), size), chunks(tokens.pack(segment), size)  # [B, N, C, D], [B, N, C]

    *_, gain = discretised(dt, A)
    power = _Powers.of(dt[:, None, None] * A, size)
    into = jnp.moveaxis(power.times(gain)[size - 1 :: -1], 0, -1)  # what an input is at the chunk's end [D, P, 2, C]
    skip = jnp.zeros((size, width), D.dtype).at[0].set(D)
    kernel = _toeplitz(power.real(2 * times(gain, C))[:size] + skip)  # [D, C, C], query by key
    read = power.times(2 * times(power.low[1], C))[:size] * jnp.array([1, -1], C.dtype)  # Re(ab) = aᵣbᵣ − aᵢbᵢ
    read = jnp.moveaxis(read.reshape(size, width, pairs), 0, 1)  # [D, C, 2P]

    before = jnp.concatenate([jnp.zeros((batch, 1), jnp.int32), now[:, :-1, -1]], 1)  # the segment that each chunk continues
    if reset is None:  # a channel's tokens and states by one matrix
        by_channel = jnp.transpose(x, (3, 2, 0, 1))  # [D, C, B, N]
        h = _carried(power[size], dot("dpcj,djbn->dpcbn", into, by_channel), h0)  # before each chunk [D, P, 2, B, N]
        both = jnp.concatenate([by_channel, h.reshape(width, pairs, *h.shape[3:])], 1)
        y = dot("dtj,djbn->bntd", jnp.concatenate([kernel, read], 2), both)
    else:
        first, (last,) = now == before[..., None], masked(now == now[..., -1:], x)
        h = _carried(power[size], dot("dpcj,bnjd->dpcbn", into, last), h0, first[..., -1])
        past = dot("dtj,djbn->bntd", read, h.reshape(width, pairs, *h.shape[3:]))
        y = _masked_convolution(kernel, x, now) + masked(first, past)[0]
    y = tokens.unpack(joined(y, length))

    # the final state is that after the last valid token, which need not end a chunk: its chunk, shifted to where it does
    chunk_of, beyond = jnp.divmod(jnp.maximum(tokens.count - 1, 0), size)
    count = jnp.minimum(beyond + 1, tokens.count)  # [B] valid tokens of that chunk

    def its(a: jax.Array) -> jax.Array:
        return a[:, -1] if valid is None else take(a, chunk_of[:, None])[:, 0]

    place = jnp.arange(size) - (size - count[:, None])  # [B, C]
    (ends,) = masked((place >= 0) & (take(its(now), place % size) == segment[:, -1:]), take(its(x), place % size))
    (h,) = masked(its(before) == segment[:, -1], times(power[count], its(jnp.moveaxis(h, (3, 4), (0, 1)))))
    return masked(valid, y)[0], h + dot("dpcj,bjd->bdpc", into, ends)


def _by_kernel(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    C: jax.Array,
    D: jax.Array,
    h0: jax.Array,
    reset: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    from unisono_jax.kernels import diagonal_ssm as kernels

    (batch, length, width), pairs = u.shape, A.shape[1]
    size = int(kernels.SIZE)
    (u,) = masked(valid, u)
    dt, A, C, D, h0 = widened(dt, A, C, D, h0)
    tokens, segment = packing(valid, batch, length), segments(reset, batch, length)
    x, now, resets = tokens.pack(u), tokens.pack(segment), segment[:, -1:]
    z = dt[:, None] * A[..., 0], dt[:, None] * A[..., 1]  # pairs [D, P]: real and imaginary parts, as are all here
    square, c = jnp.square(A[..., 0]) + jnp.square(A[..., 1]), (C[..., 0], C[..., 1])
    change = jnp.expm1(z[0]) * jnp.cos(z[1]) - 2 * jnp.square(jnp.sin(z[1] / 2)), jnp.exp(z[0]) * jnp.sin(z[1])  # as in `discretised`
    gain = _product(change, (A[..., 0] / square, -A[..., 1] / square))

    def powers(p: jax.Array) -> tuple[jax.Array, jax.Array]:
        """e^{pz} [D, P, number]."""
        (cos, sin), fades = _turned(z[1][..., None], p), jnp.exp(p * z[0][..., None])
        return fades * cos, fades * sin

    def made(power: Any, of: Any) -> tuple[jax.Array, jax.Array]:
        return _product(power, (of[0][..., None], of[1][..., None]))

    upto = _once(powers(jnp.arange(size + 1, dtype=A.dtype)))
    here = [a[..., :size] for a in upto]
    into = jnp.concatenate(made([a[..., ::-1] for a in here], gain), 1)  # [D, 2P, C]
    taps = 2 * made(here, _product(gain, c))[0].sum(1)  # [D, C]
    taps = taps.at[:, 0].add(D)
    circle = jnp.tile(jnp.concatenate([taps, jnp.zeros_like(taps)], 1), (1, size))[:, : size * (2 * size - 1)]
    kernel = circle.reshape(width, size, 2 * size - 1)[..., :size]  # [D, C, C], key by query: taps[t − j]
    real, imaginary = made([a[..., 1:] for a in upto], c)
    read = jnp.concatenate([2 * real, -2 * imaginary], 1)  # [D, 2P, C], since Re(ab) = aᵣbᵣ − aᵢbᵢ
    factor = jnp.concatenate([a[..., size] for a in upto], 1)  # [D, 2P]
    start = jnp.swapaxes(h0, 2, 3).reshape(batch, width, 2 * pairs)
    chunk, beyond = jnp.divmod(jnp.maximum(tokens.count - 1, 0), size)
    y, h = kernels.scan(x, kernel, into, read, factor, start, chunk, None if reset is None else now)

    # after the last valid token: of its chunk's state, and of its chunk's tokens, shifted to where the chunk ends
    count = jnp.minimum(beyond + 1, tokens.count)  # [B] valid tokens of that chunk
    place = jnp.arange(size) - (size - count[:, None])  # [B, C]
    at = jnp.clip(chunk[:, None] * size + place, 0, length - 1)
    before = jnp.where(chunk > 0, take(now, jnp.maximum(chunk * size - 1, 0)[:, None])[:, 0], 0)
    own = (place >= 0) & (jnp.take_along_axis(now, at, 1) == resets)
    (ends,) = masked(own, jnp.take_along_axis(x, at[..., None], 1).astype(h.dtype))
    h = jnp.swapaxes(h.reshape(batch, width, 2, pairs), 2, 3)
    kept = jnp.stack([jnp.moveaxis(a, -1, 0) for a in powers(count.astype(A.dtype))], -1)
    (h,) = masked(before == resets[:, 0], times(kept, h))
    last = h + jnp.swapaxes(dot("dpj,bjd->bdp", into, ends).reshape(batch, width, 2, pairs), 2, 3)
    return masked(valid, tokens.unpack(y))[0], last


def _product(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """Of complex numbers, whose parts are arrays."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@jax.custom_jvp
def _once(arrays: Any) -> Any:
    """The same arrays, made once and not anew in each table that is made of them; what reaches them may be made where it is summed."""
    return lax.optimization_barrier(arrays)


@_once.defjvp
def _once_jvp(given: Any, changes: Any) -> Any:
    return _once(*given), changes[0]


@jax.custom_jvp
def _turned(angle: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of p times the angle, p a natural number below 4,096: both parts of the angle have 12 digits or fewer, so that their
    products with p are exact."""
    high = lax.reduce_precision(angle, 8, 11)
    a, b = p * high, p * (angle - high)
    return jnp.cos(a) * jnp.cos(b) - jnp.sin(a) * jnp.sin(b), jnp.sin(a) * jnp.cos(b) + jnp.cos(a) * jnp.sin(b)


@_turned.defjvp
def _turned_jvp(given: Any, changes: Any) -> Any:
    (cos, sin), moved = _turned(*given), given[1] * changes[0]
    return (cos, sin), (-sin * moved, cos * moved)


def _carried(factor: jax.Array, own: jax.Array, initial: jax.Array, goes_on: jax.Array | None = None) -> jax.Array:
    """The states before each chunk [D, P, 2, B, N], from what chunks add to them and `factor` [D, P, 2] a chunk; where only some chunks
    [B, N] go on with what was before, those."""
    if goes_on is None and jax.default_backend() == "gpu":
        return _summed(factor, own, initial)

    def chunk(h: jax.Array, at_n: tuple) -> tuple[jax.Array, jax.Array]:
        added, on = at_n
        kept = times(factor, h)
        return (kept if on is None else masked(on, kept)[0]) + added, h

    _, h = lax.scan(chunk, initial, (jnp.moveaxis(own, (4, 3), (0, 1)), None if goes_on is None else goes_on.T))
    return jnp.moveaxis(h, (0, 1), (4, 3))


def _summed(factor: jax.Array, own: jax.Array, initial: jax.Array) -> jax.Array:
    """The same as sums over R chunks, then over R such sums, …: a GPU's launches cost more than the few operations of a chunk."""
    h = jnp.concatenate([jnp.moveaxis(initial, 0, -1)[..., None], own[..., :-1]], -1)
    number, reach = own.shape[-1], 1
    while reach < number:
        terms = -(-min(number, RADIX * reach) // reach)
        power, summed = factor, h
        for k in range(reach, terms * reach, reach):
            back = jnp.pad(h[..., : number - k], [(0, 0)] * 4 + [(k, 0)])
            summed = summed + jnp.moveaxis(times(power[:, :, None, None], jnp.moveaxis(back, 2, -1)), -1, 2)
            power = times(power, factor)
        h, factor, reach = summed, power, reach * terms
    return h


class _Powers(NamedTuple):
    """e^{pz} of pairs z [D, P, 2] for p = 0 … most: high[p // R] low[p % R]. Products with them are made of such small tables."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, z: jax.Array, most: int) -> _Powers:
        radix = max(2, math.isqrt(most))
        low = _turns(jnp.stack([jnp.cos(z[..., 1]), jnp.sin(z[..., 1])], -1), radix)
        high = _turns(low[radix], most // radix)

        def sized(turns: jax.Array, step: int) -> jax.Array:
            return turns * jnp.exp(step * jnp.arange(len(turns), dtype=z.dtype)[:, None, None] * z[..., 0])[..., None]

        return cls(sized(high, radix), sized(low[:radix], 1))

    def __getitem__(self, p: int | jax.Array) -> jax.Array:
        high, low = divmod(p, len(self.low))
        return times(self.high[high], self.low[low])

    def times(self, a: jax.Array) -> jax.Array:
        """a e^{pz} [most + 1 or more, D, P, 2]."""
        return times(self.high[:, None], times(self.low, a)).reshape(-1, *a.shape)

    def real(self, a: jax.Array) -> jax.Array:
        """Re Σ_P a e^{pz} [most + 1 or more, D]."""
        conjugate = self.high * jnp.array([1, -1], a.dtype)  # Re(ab) = aᵣbᵣ − aᵢbᵢ
        return dot("adpc,bdpc->abd", conjugate, times(self.low, a)).reshape(-1, len(a))


def _turns(turn: jax.Array, most: int) -> jax.Array:
    """turn⁰ … turn^most of pairs of size 1, by doubling: p times an angle loses the digits of one that goes round often.

    Each is brought back to size 1, lest its roundings add up to a decay of their own.
    """
    out = jnp.stack([jnp.broadcast_to(jnp.array([1, 0], turn.dtype), turn.shape), turn])
    while len(out) <= most:
        more = times(out[1:], out[-1])
        out = jnp.concatenate([out, more * lax.rsqrt(jnp.square(more).sum(-1, keepdims=True))])
    return out[: most + 1]


def _toeplitz(kernel: jax.Array) -> jax.Array:
    """kernel [C, D] → [D, t, j]: kernel[t − j], 0 above the diagonal. A circulant's rows by reshaping: a gather's gradient is slow."""
    size, width = kernel.shape
    circle = jnp.concatenate([kernel[:1], jnp.zeros((size, width), kernel.dtype), kernel[:0:-1]]).T  # [D, 2C]
    rows = jnp.tile(circle, (1, size))[:, : size * (2 * size - 1)]
    return rows.reshape(width, size, 2 * size - 1)[..., :size]


def _masked_convolution(kernel: jax.Array, x: jax.Array, segment: jax.Array) -> jax.Array:
    """Σ_j kernel[t, j] x_j over the keys j of t's own segment; a chunk at a time, recomputed for the gradient."""

    by_key = jnp.moveaxis(kernel, 0, -1)  # [t, j, D]

    @jax.checkpoint
    def chunk(at_n: tuple) -> jax.Array:
        x, segment = at_n  # [B, C, D], [B, C]
        same = segment[:, :, None] == segment[:, None, :]
        return (jnp.where(same[..., None], by_key, 0) * x[:, None]).sum(2)  # one fused loop: nothing of [B, C, C, D] is held

    return jnp.swapaxes(lax.map(chunk, (jnp.swapaxes(x, 0, 1), jnp.swapaxes(segment, 0, 1))), 0, 1)
