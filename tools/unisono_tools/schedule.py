"""The learning rate: computed once for every backend, in float64."""

from __future__ import annotations

import math

from unisono_tools.config import Schedule


def learning_rate(step: int, steps: int, peak: float, schedule: Schedule) -> float:
    """The rate of step `step` (0, 1, …, steps − 1): a linear warm-up, then a cosine (Loshchilov & Hutter 2017) or a line to the
    final share, or the peak.

    The first step of the warm-up already moves (rate peak / warmup_steps); the last step of the run has the final rate.
    """
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step + 1 - warmup) / max(1, steps - warmup)
    low = schedule.final_fraction
    if schedule.kind == "constant":
        return peak
    left = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (low + (1 - low) * left)
