"""CRAM's adaptive compression scheme: ξ_t = ξ_{t−1} + s_t σ(x_t), ξ_{−1} = 0 (Muraleedharan, eqs 8–10).

Weights carry the source's index, not the output's (eq 7 as printed admits no recurrence). `exclusive` gives the printed
sums, without token t.

Shapes: x [B, T, D], s [B, T], state [B, D], reset and valid [B, T] bool or None. Each form returns (ξ, final state).
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.elementwise import sigmoid


def step(
    x: np.ndarray,
    s: np.ndarray,
    state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    exclusive: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """One token: x [B, D], s, reset and valid [B]."""
    if reset is not None:
        state = np.where(reset[:, None], 0, state)
    xi = state + s[:, None] * sigmoid(x)  # eq 10
    if valid is not None:
        xi = np.where(valid[:, None], xi, state)
    return (state if exclusive else xi), xi


@shaped
def recurrent(
    x: np.ndarray,
    s: np.ndarray,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    exclusive: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    state, out = initial_state, []
    for t in range(x.shape[1]):
        marks = (None if reset is None else reset[:, t], None if valid is None else valid[:, t])
        xi, state = step(x[:, t], s[:, t], state, *marks, exclusive)
        out.append(xi)
    return np.stack(out, 1), state


@shaped
def parallel(
    x: np.ndarray,
    s: np.ndarray,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    exclusive: bool = False,
    chunk_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """A segmented sum inside chunks of C tokens, as one masked matmul, with a carry between them."""
    batch, length, _ = x.shape
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    u = np.where(valid[..., None], s[..., None] * logistic(x), 0)
    carry, out = np.where(reset[:, :1], 0, initial_state), []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        segment = np.cumsum(reset[:, part], 1)  # [B, C]
        same = segment[:, :, None] == segment[:, None, :]  # [B, C, C], query by key
        kept = (segment == 0)[..., None]
        xi = np.tril(same, -1 if exclusive else 0).astype(np.real(x).dtype) @ u[:, part] + np.where(kept, carry[:, None], 0)
        out.append(xi)
        carry = xi[:, -1] + u[:, part][:, -1] if exclusive else xi[:, -1]
    return np.concatenate(out, 1), carry


def logistic(x: np.ndarray) -> np.ndarray:
    """σ of the parallel form: e^x / (e^x + 1) or 1 / (1 + e^−x), whichever cannot overflow."""
    low, high = np.where(np.real(x) < 0, x, 0), np.where(np.real(x) < 0, 0, -x)
    return np.exp(low) / (np.exp(low) + np.exp(high))
