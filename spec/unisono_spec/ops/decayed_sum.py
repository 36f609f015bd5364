"""CRAM's fixed compression scheme: ξ_t = λ ξ_{t−1} + (1−λ) σ(x_t), ξ_{−1} = 0 (Muraleedharan, eqs 2–5, with λ = ½).

ξ_t includes x_t: it is the paper's Ξ_{t+1}, which predicts x_{t+1}.

Shapes: x [B, T, D], state [B, D], reset and valid [B, T] bool or None. Each form returns (ξ, final state).
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.elementwise import sigmoid


def step(
    x: np.ndarray, decay: float, state: np.ndarray, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One token: x [B, D], reset and valid [B]."""
    if reset is not None:
        state = np.where(reset[:, None], 0, state)
    xi = decay * state + (1 - decay) * sigmoid(x)  # eq 5
    if valid is not None:
        xi = np.where(valid[:, None], xi, state)
    return xi, xi


@shaped
def recurrent(
    x: np.ndarray, decay: float, initial_state: np.ndarray, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    state, out = initial_state, []
    for t in range(x.shape[1]):
        xi, state = step(x[:, t], decay, state, None if reset is None else reset[:, t], None if valid is None else valid[:, t])
        out.append(xi)
    return np.stack(out, 1), state


@shaped
def parallel(
    x: np.ndarray,
    decay: float,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    chunk_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """The closed form (eq 2) inside chunks of C tokens, with a carry between them.

    ξ_t = Σ_{j≤t} (1−λ) λ^{n_t−n_j} σ(x_j) + λ^{n_t} ξ_{−1}, where n counts the valid tokens read; a reset cuts both terms.
    """
    batch, length, _ = x.shape
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    u = np.where(valid[..., None], logistic(x), 0)
    carry, out = np.where(reset[:, :1], 0, initial_state), []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        n = np.cumsum(valid[:, part], 1, dtype=np.real(x).dtype)  # [B, C]
        segment = np.cumsum(reset[:, part], 1)  # [B, C]
        reads = np.tril(segment[:, :, None] == segment[:, None, :])  # [B, C, C], query by key
        power = np.where(reads, n[:, :, None] - n[:, None, :], 0)
        weight = np.where(reads, (1 - decay) * decay**power, 0)
        kept = np.where(segment == 0, decay**n, 0)  # [B, C]
        xi = weight @ u[:, part] + kept[..., None] * carry[:, None]
        out.append(xi)
        carry = xi[:, -1]
    return np.concatenate(out, 1), carry


def logistic(x: np.ndarray) -> np.ndarray:
    """σ of the parallel form: e^x / (e^x + 1) or 1 / (1 + e^−x), whichever cannot overflow."""
    low, high = np.where(np.real(x) < 0, x, 0), np.where(np.real(x) < 0, 0, -x)
    return np.exp(low) / (np.exp(low) + np.exp(high))
