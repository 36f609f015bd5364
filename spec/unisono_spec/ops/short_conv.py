"""Causal depthwise convolution over the last w tokens: y_t = Σ_d weight[:, w−1−d] ∘ x_{t−d} + bias. Before the first token stand zeros.

Shapes: x [B, T, D], weight [D, 1, w] (the last tap is the present token's), bias [D] or None, state [B, w−1, D]: the last
w−1 inputs, oldest first; reset and valid [B, T] bool or None. Each form returns (y [B, T, D], final state). y is 0 where a
token is not valid.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.fold import fold


def step(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One token: x [B, D], reset and valid [B]."""
    if reset is not None:
        state = np.where(reset[:, None, None], 0, state)
    seen = np.concatenate([state, x[:, None]], 1)  # [B, w, D]
    y = (seen * weight[:, 0].T).sum(1)
    y = y if bias is None else y + bias
    if valid is None:
        return y, seen[:, 1:]
    return np.where(valid[:, None], y, 0), np.where(valid[:, None, None], seen[:, 1:], state)


@shaped
def recurrent(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(lambda x_t, *rest: step(x_t, weight, bias, *rest), (x,), initial_state, reset, valid)


@shaped
def parallel(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    initial_state: np.ndarray,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    chunk_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """One shift matrix a tap, over the w−1 carried inputs and the C of a chunk; it finds the valid token d places back."""
    batch, length, _ = x.shape
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    x = np.where(valid[..., None], x, 0)
    carried, out = weight.shape[-1] - 1, []
    carry = np.where(reset[:, 0, None, None], 0, initial_state)
    slots = np.broadcast_to(np.arange(1 - carried, 1), (batch, carried))  # the order of carried inputs; the newest is 0
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        read = valid[:, part]
        order = np.concatenate([slots, np.cumsum(read, 1)], 1)  # [B, w−1+C]
        segment = np.concatenate([np.zeros((batch, carried), int), np.cumsum(reset[:, part], 1)], 1)
        present = np.concatenate([np.ones((batch, carried), bool), read], 1)
        inputs = np.concatenate([carry, x[:, part]], 1)
        back = order[:, carried:, None] - order[:, None, :]  # [B, C, w−1+C]
        reads = present[:, None] & (segment[:, carried:, None] == segment[:, None, :])
        y = np.zeros_like(x[:, part]) if bias is None else np.zeros_like(x[:, part]) + bias
        for d in range(carried + 1):
            shift = (reads & (back == d)).astype(np.real(x).dtype)
            y = y + (shift @ inputs) * weight[:, 0, carried - d]
        out.append(np.where(read[..., None], y, 0))
        last = present & (segment == segment[:, -1:])
        wanted = order[:, -1:] + np.arange(1 - carried, 1)  # [B, w−1]
        carry = (last[:, None] & (order[:, None] == wanted[..., None])).astype(np.real(x).dtype) @ inputs
    return np.concatenate(out, 1), carry
