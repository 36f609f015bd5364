"""The recurrent form of every op: a fold of its `step`. Parallel forms do not use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def fold(
    step: Callable[..., tuple[np.ndarray, Any]],
    inputs: Sequence[np.ndarray],
    initial_state: Any,
    reset: np.ndarray | None,
    valid: np.ndarray | None,
) -> tuple[np.ndarray, Any]:
    """inputs [B, T, …]: step(*inputs at t, state, reset at t, valid at t) → outputs [B, T, …], final state."""
    state, out = initial_state, []
    for t in range(inputs[0].shape[1]):
        marks = (None if m is None else m[:, t] for m in (reset, valid))
        o, state = step(*(x[:, t] for x in inputs), state, *marks)
        out.append(o)
    return np.stack(out, 1), state
