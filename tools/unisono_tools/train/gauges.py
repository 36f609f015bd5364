"""What a model's weights say of themselves while it is trained, for the log: few numbers, and none where there is nothing to say."""

from __future__ import annotations

import numpy as np
from unisono_spec.contract import Arrays, Config


def gauges(config: Config, params: Arrays) -> dict[str, float]:
    """Decays λ and the mean of gates, both for an input of zero; how much each bank of a memory is used, averaged.

    Names: decay.LAYER.SCALE, gate.LAYER, load.LAYER.BANK.
    """
    found: dict[str, float] = {}
    for name in config.params():
        for end, kind in config.gauges.items():
            if not name.endswith(end):
                continue
            layer, values = name.split(".")[1], params[name].astype(np.float64)
            if kind != "load":
                values = 1 / (1 + np.exp(-values))
            if kind == "gate":
                found[f"gate.{layer}"] = float(values.mean())
                continue
            found |= {f"{kind}.{layer}.{i}": float(value) for i, value in enumerate(values)}
    return found
