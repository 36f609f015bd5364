"""The selective scan of Mamba, S6 (Gu & Dao 2024, eq 2a–2b and algorithm 2, with B discretised as Δ B):

h_t = exp(Δ_t A) ∘ h_{t−1} + Δ_t B_t u_t,  y_t = C_t h_t + D ∘ u_t.

Shapes, with D channels of N states: u, dt (Δ > 0) [B, T, D], A (< 0) [D, N], B, C [B, T, N], D [D], state h [B, D, N], reset and
valid [B, T] bool or None. Each form returns (y [B, T, D], final state). y is 0 where a token is not valid.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.fold import fold


def step(
    u: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One token: u, dt [B, D], B, C [B, N], reset and valid [B]."""
    if reset is not None:
        state = np.where(reset[:, None, None], 0, state)
    if valid is not None:
        u, dt, B, C = (np.where(valid[:, None], a, 0) for a in (u, dt, B, C))  # Δ = 0 keeps h as it is
    h = kept(dt[..., None] * A) * state + (dt * u)[..., None] * B[:, None]
    return (h * C[:, None]).sum(-1) + D * u, h


@shaped
def recurrent(
    u: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(lambda u, dt, B, C, *rest: step(u, dt, A, B, C, D, *rest), (u, dt, B, C), initial_state, reset, valid)


@shaped
def parallel(
    u: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    chunk_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """An inclusive scan over the maps h → a h + b by doubling (Hillis & Steele 1986) inside chunks, and a carry between them.

    A reset is a map with a = 0, a token that is not valid one with a = 1 and b = 0.
    """
    keep = np.ones(u.shape[:2], bool) if valid is None else valid
    u, dt, B, C = (np.where(keep[..., None], a, 0) for a in (u, dt, B, C))
    h, out = initial_state if reset is None else np.where(reset[:, 0, None, None], 0, initial_state), []
    for start in range(0, u.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        a = kept(np.einsum("btd,dn->btdn", dt[:, part], A))
        b = np.einsum("btd,btd,btn->btdn", dt[:, part], u[:, part], B[:, part])
        if reset is not None:
            a = np.where(reset[:, part, None, None], 0, a)
        reach = 1
        while reach < a.shape[1]:
            b = np.concatenate([b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]], 1)
            a = np.concatenate([a[:, :reach], a[:, reach:] * a[:, :-reach]], 1)
            reach *= 2
        states = a * h[:, None] + b  # [B, C, D, N]
        out.append(np.einsum("btdn,btn->btd", states, C[:, part]) + D * u[:, part])
        h = states[:, -1]
    return np.concatenate(out, 1), h


def kept(x: np.ndarray) -> np.ndarray:
    """e^x, x = Δ A: what a token leaves of a state."""
    return np.exp(x)
