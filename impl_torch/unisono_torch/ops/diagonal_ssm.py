"""S4D: per channel, N/2 complex states that turn and decay at rates of their own (Gu et al. 2022, eqs 2, 4 and 5), B = 1.

h_t = e^{ΔA} h_{t−1} + (e^{ΔA} − 1) / A · u_t (zero-order hold),  y_t = 2 Re(Σ_n C_n h_{t,n}) + D u_t.

Complex numbers are pairs of reals in a last axis of 2. e^{ΔA} − 1 is computed without cancellation: ΔA may be as small as 1e-3.
e^{ΔA} and its powers are made in float64: a float32 phase of 10 radians would be wrong by 64 times its rounding 64 tokens later.

Shapes, P = N/2: u [B, T, D], dt (Δ) and D [D], A and C [D, P, 2], state [B, D, P, 2], reset and valid [B, T] bool or None.
Each form returns (y [B, T, D], final state), float32 or wider. y is 0 where a token is not valid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from unisono_spec.contract.shapes import shaped

from unisono_torch.ops.compact import Compact, segments, take
from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.fold import fold, masked, restarted
from unisono_torch.ops.precision import exact
from unisono_torch.ops.recurrence import chunks

NEAR = 1e-16  # |ΔA|² below which three terms of the series of (e^z − 1)/A, z = ΔA, have all digits, and |A|² may be 0
SMALL_CHUNK = 16  # with resets, whose convolution goes lag by lag


@exact
def step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: u [B, D], reset and valid [B]."""
    dtype = wide(u.dtype)
    state, C, D = (a.to(dtype) for a in (state, C, D))
    if reset is not None:
        (state,) = masked(~reset, state)
    u = masked(valid, u)[0].to(dtype)
    new = _product(powers(dt, A, 1)[1].to(dtype), state) + gain(dt, A).to(dtype) * u[..., None, None]
    y = 2 * (_conjugate(C) * new).sum((-1, -2)) + D * u
    if valid is None:
        return y, new
    return torch.where(valid[:, None], y, 0), torch.where(valid[:, None, None, None], new, state)


@shaped
@exact
def recurrent(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(lambda u, *rest: step(u, dt, A, C, D, *rest), (u,), initial_state, reset, valid)


@shaped
@exact
def parallel(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The convolution with the kernel 2 Re(C e^{pΔA} (e^{ΔA} − 1)/A), p valid tokens back, inside chunks; a carry between them.

    Without resets a chunk is one matmul a channel, with a Toeplitz matrix. With resets, each pair of tokens has a mask of its own,
    and the convolution goes lag by lag. The kernel divides by A: no pair of it may be 0 there.
    """
    initial_state = restarted(reset, initial_state)
    if use_triton(implementation, "diagonal_ssm", u.device, u.dtype, {"P": C.shape[1]}):
        from unisono_torch.kernels.diagonal_ssm import diagonal_ssm as kernel
        from unisono_torch.kernels.diagonal_ssm import discretised

        return kernel(u, *discretised(dt, A), C, D, initial_state, reset, valid)
    dtype, length = wide(u.dtype), u.shape[1]
    C, D, initial = (a.to(dtype) for a in (C, D, initial_state))
    size = min(chunk_size, length) if reset is None else min(chunk_size, length, SMALL_CHUNK)
    compact, segment = Compact(valid, u), segments(reset, u)
    now, u = compact.pack(segment), compact.pack(u).to(dtype)
    x = chunks(u, size)  # [B, N, C, D]
    power = powers(dt, A, size).to(dtype)  # e^{pΔA} [C+1, D, P, 2]
    grown = _product(power[:-1], gain(dt, A).to(dtype))  # what an input has become p tokens later [C, D, P, 2]
    kernel = 2 * (_conjugate(C) * grown).sum((-1, -2))  # [C, D]
    reading = 2 * _conjugate(_product(power[1:], C))  # of the state before the chunk, by the tokens in it [C, D, P, 2]

    if reset is None:
        lag = torch.arange(size, device=u.device)
        lag = lag[:, None] - lag
        toeplitz = torch.where(lag >= 0, kernel.T[:, lag.clamp(min=0)], 0)  # [D, C, C]
        y, last, keep, first = torch.einsum("dij,bnjd->bnid", toeplitz, x), x, None, now.new_zeros(x.shape[:2])
    else:
        owner = chunks(now, size)  # the segment of each token [B, N, C]
        first = torch.cat([torch.zeros_like(owner[:, :1, -1]), owner[:, :-1, -1]], 1)  # ... and of the state before the chunk [B, N]
        (last,) = masked(owner == owner[..., -1:], x)
        y, keep = _lags(kernel, x, owner), owner[..., -1] == first
    own = torch.einsum("jdpr,bnjd->bndpr", grown.flip(0), last)  # what a chunk adds to the state after it
    before = _carry(own, power[-1], keep, initial)  # [B, N, D, P, 2]
    heard = torch.einsum("idpr,bndpr->bnid", reading, before)
    if reset is not None:
        (heard,) = masked(owner == first[..., None], heard)
    y = compact.unpack((y + heard).flatten(1, 2)[:, :length] + D * u)

    # the state after each row's last valid token: from the state before its chunk, and the tokens since
    number = (compact.read - 1).clamp(min=0) // size  # [B]
    place = (compact.read - size)[:, None] + torch.arange(size, device=u.device)  # [B, C]
    counted = (place >= (number * size)[:, None]) & (take(now, place.clamp(min=0)) == segment[:, -1:])
    (since,) = masked(counted, take(u, place.clamp(min=0)))
    start = take(before, number[:, None])[:, 0]  # [B, D, P, 2]
    (start,) = masked(take(first, number[:, None])[:, 0] == segment[:, -1], start)
    final = torch.einsum("jdpr,bjd->bdpr", grown.flip(0), since) + _product(power[compact.read - number * size], start)
    return y, final


def _lags(kernel: Tensor, x: Tensor, owner: Tensor) -> Tensor:
    """Σ_p kernel_p x_{t−p} over tokens of one segment: kernel [C, D], x [B, N, C, D], owner [B, N, C]."""
    size, y = x.shape[2], kernel[0] * x
    x, earlier = F.pad(x, (0, 0, size, 0)), F.pad(owner, (size, 0), value=-1)
    for p in range(1, size):
        (part,) = masked(earlier[:, :, size - p : -p] == owner, x[:, :, size - p : -p])
        y = torch.addcmul(y, part, kernel[p])
    return y


def _carry(own: Tensor, power: Tensor, keep: Tensor | None, initial: Tensor) -> Tensor:
    """The state before each chunk [B, N, D, P, 2]."""
    h, before = initial, [initial]
    for n, added in enumerate(own.unbind(1)[:-1]):
        (kept,) = masked(None if keep is None else keep[:, n], _product(power, h))
        h = kept + added
        before.append(h)
    return torch.stack(before, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of complex numbers as pairs [..., 2]."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], -1)


def _conjugate(a: Tensor) -> Tensor:
    """So that a sum of products of pairs is the real part of the product."""
    return torch.stack([a[..., 0], -a[..., 1]], -1)


def powers(dt: Tensor, A: Tensor, most: int) -> Tensor:
    """e^{pΔA} for p from 0 to `most` [most + 1, D, P, 2], float64."""
    x, y = (dt.double()[:, None] * a for a in A.double().unbind(-1))
    one = torch.stack([x.exp() * y.cos(), x.exp() * y.sin()], -1)
    powers = torch.stack([torch.stack([torch.ones_like(x), torch.zeros_like(x)], -1), one])
    while len(powers) <= most:
        powers = torch.cat([powers, _product(powers[1:], powers[-1])])
    return powers[: most + 1]


def gain(dt: Tensor, A: Tensor) -> Tensor:
    """(e^{ΔA} − 1) / A [D, P, 2], float64; with ΔA = x + iy, cos y − 1 = −2 sin²(y/2). Δ, the limit, where A is 0."""
    A, step = A.double(), dt.double()[:, None]
    x, y = (step * a for a in A.unbind(-1))
    near = (x.square() + y.square() < NEAR)[..., None]
    top = torch.stack([x.expm1() * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin()], -1)
    safe = torch.where(near, 1, A)
    series = torch.stack([1 + x / 2 + (x.square() - y.square()) / 6, y / 2 + x * y / 3], -1) * step[..., None]  # Δ (1 + z/2 + z²/6)
    return torch.where(near, series, _product(top, _conjugate(safe)) / safe.square().sum(-1, keepdim=True))
