"""S4D: per channel, N/2 complex states that turn and decay at rates of their own (Gu et al. 2022, eqs 2, 4 and 5), B = 1.

h_t = e^{ΔA} h_{t−1} + (e^{ΔA} − 1) / A · u_t (zero-order hold),  y_t = 2 Re(Σ_n C_n h_{t,n}) + D u_t.

Complex numbers are pairs of reals in a last axis of 2, in float32 too: no framework, file or graph then needs complex dtypes.
e^{ΔA} − 1 is computed without cancellation: ΔA may be as small as 1e-3. Where A is 0 its quotient by A is Δ, the limit.

Shapes, P = N/2: u [B, T, D], dt (Δ) and D [D], A and C [D, P, 2], state [B, D, P, 2], reset and valid [B, T] bool or None.
Each form returns (y [B, T, D], final state). y is 0 where a token is not valid.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.fold import fold

NEAR = 1e-16  # |ΔA|² below which (e^z − 1)/A, z = ΔA, is Δ (1 + z/2 + z²/6) to all digits; |A|² may be 0 there


def step(
    u: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One token: u [B, D], reset and valid [B]."""
    if reset is not None:
        state = np.where(reset[:, None, None, None], 0, state)
    if valid is not None:
        u = np.where(valid[:, None], u, 0)
    Ar, Ai = A[..., 0], A[..., 1]
    x, y = dt[:, None] * Ar, dt[:, None] * Ai  # ΔA = x + iy
    factor = np.exp(x) * np.cos(y), np.exp(x) * np.sin(y)
    top = np.expm1(x) * np.cos(y) - 2 * np.sin(y / 2) ** 2, factor[1]  # e^{x+iy} − 1, since cos y − 1 = −2 sin²(y/2)
    near = np.real(x * x + y * y) < NEAR
    size, step = np.where(near, 1, Ar * Ar + Ai * Ai), dt[:, None]
    gain = (
        np.where(near, step * (1 + x / 2 + (x * x - y * y) / 6), (top[0] * Ar + top[1] * Ai) / size),
        np.where(near, step * (y / 2 + x * y / 3), (top[1] * Ar - top[0] * Ai) / size),
    )
    hr, hi = state[..., 0], state[..., 1]
    new = np.stack([factor[0] * hr - factor[1] * hi + gain[0] * u[..., None], factor[0] * hi + factor[1] * hr + gain[1] * u[..., None]], -1)
    o = 2 * (C[..., 0] * new[..., 0] - C[..., 1] * new[..., 1]).sum(-1) + D * u
    if valid is None:
        return o, new
    return np.where(valid[:, None], o, 0), np.where(valid[:, None, None, None], new, state)


@shaped
def recurrent(
    u: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(lambda u, *rest: step(u, dt, A, C, D, *rest), (u,), initial_state, reset, valid)


@shaped
def parallel(
    u: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    chunk_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """The convolution with the kernel 2 Re(C e^{pΔA} (e^{ΔA} − 1)/A), p valid tokens back, inside chunks; a carry between them."""
    batch, length, _ = u.shape
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    u = np.where(valid[..., None], u, 0)
    a, b = np.moveaxis(A * dt[:, None, None], -1, 0)  # ΔA = a + ib, each [D, P]
    # e^z − 1 = 2 e^{z/2} sinh(z/2) keeps the quotient's digits; 2 e^{a/2} sinh(a/2) is e^a − 1, and with cosh e^a + 1
    sr, si = np.expm1(a) * np.cos(b / 2), (np.exp(a) + 1) * np.sin(b / 2)
    er, ei = sr * np.cos(b / 2) - si * np.sin(b / 2), sr * np.sin(b / 2) + si * np.cos(b / 2)
    Ar, Ai = A[..., 0], A[..., 1]
    still = np.real(a) ** 2 + np.real(b) ** 2 < NEAR
    norm = np.where(still, 1, Ar * Ar + Ai * Ai)
    gr, gi = (er * Ar + ei * Ai) / norm, (ei * Ar - er * Ai) / norm  # [D, P]
    one = 3 + a, b  # Δ (1 + z (3 + z) / 6), as a product of pairs
    gr = np.where(still, dt[:, None] * (1 + (a * one[0] - b * one[1]) / 6), gr)
    gi = np.where(still, dt[:, None] * (a * one[1] + b * one[0]) / 6, gi)

    p = np.arange(min(chunk_size, length) + 1, dtype=np.real(a).dtype)[:, None, None]
    decay = np.exp(p * a)
    pr, pi = decay * np.cos(p * b), decay * np.sin(p * b)  # e^{pΔA} [C+1, D, P]
    fr, fi = pr * gr - pi * gi, pr * gi + pi * gr  # what an input has become p tokens later
    kernel = 2 * (C[..., 0] * fr - C[..., 1] * fi).sum(-1)  # [C+1, D]
    hr, hi = np.moveaxis(np.where(reset[:, 0, None, None, None], 0, initial_state), -1, 0)
    out = []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        n = np.cumsum(valid[:, part], 1)  # [B, C]
        segment = np.cumsum(reset[:, part], 1)
        reads = np.tril(segment[:, :, None] == segment[:, None, :])  # [B, C, C], query by key
        back = np.where(reads, n[:, :, None] - n[:, None, :], 0)
        y = np.einsum("btjd,bjd->btd", np.where(reads[..., None], kernel[back], 0), u[:, part])
        cr, ci = C[..., 0] * pr - C[..., 1] * pi, C[..., 0] * pi + C[..., 1] * pr  # C e^{pΔA}
        carried = 2 * (np.einsum("btdp,bdp->btd", cr[n], hr) - np.einsum("btdp,bdp->btd", ci[n], hi))
        y = y + np.where((segment == 0)[..., None], carried, 0) + D * u[:, part]
        out.append(np.where(valid[:, part, None], y, 0))

        last, since = (reads[:, -1])[..., None, None], n[:, -1:] - n
        kr, ki = np.where(last, fr[since], 0), np.where(last, fi[since], 0)  # [B, C, D, P]
        first, whole = (segment[:, -1] == 0)[:, None, None], n[:, -1]
        keep = np.where(first, pr[whole] * hr - pi[whole] * hi, 0), np.where(first, pr[whole] * hi + pi[whole] * hr, 0)
        hr = np.einsum("bjdp,bjd->bdp", kr, u[:, part]) + keep[0]
        hi = np.einsum("bjdp,bjd->bdp", ki, u[:, part]) + keep[1]
    return np.concatenate(out, 1), np.stack([hr, hi], -1)
