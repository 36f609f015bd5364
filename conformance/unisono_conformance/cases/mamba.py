"""Mamba before the court."""

from __future__ import annotations

from typing import Any

import numpy as np
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.ops import selective_scan

from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays
from unisono_conformance.cases.pairwise import pairwise
from unisono_conformance.cases.selective_scan import SelectiveScan, nearly_kept


class Mamba(ModelCase):
    name = arch = "mamba"
    defaults = ("plain", "biased")
    inexact = ((selective_scan, "kept", nearly_kept),)
    regimes = ("tame", "near_one", "forgetting", "saturated", "offset", "large", "dropout")

    def __init__(self) -> None:
        small: dict[str, Any] = {"d_model": 4, "n_layers": 1, "vocab_size": 7, "d_state": 3, "conv_width": 4}
        self.wide = {"wide": MambaConfig(**{**small, "d_model": 96})}
        # a dropout rate in the config must not act in evaluation
        self.variants = {
            "plain": MambaConfig(**{**small, "n_layers": 2}, dropout=0.25),
            "biased": MambaConfig(**small, bias=True, tie_head=False, head_bias=True, dt_rank=2, norm_eps=1e-2, dropout=0.25),
            **{str(i): MambaConfig(**{**small, **row}) for i, row in enumerate(pairwise(FIELDS, lambda row: True))},
        }

    def bend(self, draw: Draw, params: Arrays) -> Arrays:
        """exp(Δ A) near 1 and near 0 by the bias of Δ; the gate SiLU(z) far out on both sides; values and norms."""
        out = dict(params)
        for name, p in params.items():
            if name.endswith("dt_proj.bias") and draw.regime in ("near_one", "forgetting"):
                out[name] = p - 4.0 if draw.regime == "near_one" else p + 12.0
            if name.endswith("in_proj.weight") and draw.regime == "saturated":
                z = np.arange(len(p))[:, None] >= len(p) // 2
                out[name] = np.where(z, 60.0 * p, p)
            if name.endswith("conv1d.bias") and draw.regime == "offset":
                out[name] = p + 4.0
            if name.endswith("norm.weight") and draw.regime == "large":
                out[name] = 8.0 * p
        return out

    def reach(self, setting: MambaConfig, dtype: str, state: str) -> int | None:
        """The first convolution keeps embeddings of the last tokens only; later ones are fed by h, whose slow channels forget little."""
        return setting.conv_width - 1 if state == "layers.0.conv" else None


FIELDS = {
    "bias": (False, True),
    "conv_bias": (False, True),
    "tie_head": (False, True),
    "head_bias": (False, True),
    "dt_rank": (0, 3),
    "expand": (1, 2),
    "conv_width": (1, 2, 4),
    "n_layers": (1, 2),
}

CASES = (SelectiveScan(), Mamba())
