"""What a model's weights say of themselves while it is trained, for the log: few numbers, and none where there is nothing to say."""

from __future__ import annotations

import numpy as np
from unisono_spec.contract import Arrays, Config

# the end of a parameter's name → what its numbers are called, one curve each
GAUGES = {".mixer.decay.bias": "decay", ".mixer.gate.bias": "gate", ".balance_load": "load"}


def gauges(config: Config, params: Arrays) -> dict[str, float]:
    """InfinityFormer's decays λ and the mean of its gates, both for an input of zero; how much each bank of MARU is used, averaged.

    Names: decay.LAYER.SCALE, gate.LAYER, load.LAYER.BANK.
    """
    found: dict[str, float] = {}
    for name in config.params():
        for end, kind in GAUGES.items():
            if not name.endswith(end) or config.arch not in ("infinityformer", "maru"):
                continue
            layer, values = name.split(".")[1], params[name].astype(np.float64)
            if kind != "load":
                values = 1 / (1 + np.exp(-values))
            if kind == "gate":
                found[f"gate.{layer}"] = float(values.mean())
                continue
            found |= {f"{kind}.{layer}.{i}": float(value) for i, value in enumerate(values)}
    return found
