"""The absolute position of each token: how many valid tokens its sequence held before it. int32, counted from the state.

Shapes: initial_state [B] int32, reset and valid [B, T] bool or None. Each form returns (position, final state).
"""

from __future__ import annotations

import numpy as np


def step(state: np.ndarray, reset: np.ndarray | None = None, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One token: reset and valid [B] → position [B], count after it [B]."""
    position = state if reset is None else np.where(reset, 0, state).astype(np.int32)
    return position, position + (np.int32(1) if valid is None else valid.astype(np.int32))


def parallel(
    initial_state: np.ndarray, length: int, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """[B, T]: valid tokens before each one, less those before its sequence began (integers, so the difference is exact)."""
    batch = len(initial_state)
    valid = np.ones((batch, length), bool) if valid is None else valid
    before = np.cumsum(valid, 1) - valid  # [B, T]
    if reset is None:
        reset = np.zeros((batch, length), bool)
    start = np.maximum.accumulate(np.where(reset, before, -1), 1)  # [B, T], −1 before the first reset
    position = np.where(start < 0, initial_state[:, None] + before, before - start).astype(np.int32)
    return position, position[:, -1] + valid[:, -1].astype(np.int32)
