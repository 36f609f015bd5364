"""Mistakes in the departures of CRAM's adaptive scheme."""

from __future__ import annotations

from typing import Any

import numpy as np
from unisono_spec.layers import cram as layer
from unisono_spec.models import cram as model

from unisono_conformance.sabotage import Sabotage


def _summed(change: Any) -> tuple:
    """The sum with its departures, of which `change` sees config, weights and scores."""
    original = layer.summed

    def run(p, config, u, s, sums, read):
        p, config, u, s = change(p, config, u, s)
        return original(p, config, u, s, sums, read)

    return ((model, "summed", run),)


def _same_decay(p, config, u, s):
    decay = p.get("mixer.decay")
    return (p if decay is None else {**p, "mixer.decay": np.full_like(decay, decay.mean())}), config, u, s


def _one_weight(p, config, u, s):
    return p, config, u, s[..., :1] + 0 * s


DEPARTURES = (
    Sabotage("one decay for all channels", "P1", _summed(_same_decay)),
    Sabotage("one weight for all channels", "P1", _summed(_one_weight)),
    Sabotage("another ε beside the sum of weights", "P1", ((layer, "EPS", 1e-2),)),
)
