"""S4D before the court."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from unisono_spec.contract.s4d import S4DConfig
from unisono_spec.ops import diagonal_ssm

from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.diagonal_ssm import DiagonalSSM
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays
from unisono_conformance.cases.pairwise import pairwise
from unisono_conformance.judging import numerics

DRAWS = 8  # of the error of e^{ΔA}: that many parts of a batch of realisations have one each


def nearly_turned(op: Callable[..., Any]) -> Callable[..., Any]:
    """e^{ΔA} errs by its own last digits however near 1 it is, at every token alike: e^{ΔA} (1 + δ) is e^{ΔA + δ}. A has no rows, which
    realisations are: parts of the batch are read one after another, each with a δ of its own."""

    def run(u: np.ndarray, dt: np.ndarray, A: np.ndarray, C: np.ndarray, D: np.ndarray, state: np.ndarray, *more: Any) -> Any:
        parts = np.array_split(np.arange(len(u)), min(DRAWS, max(len(u), 1)))
        errors = numerics.alike(np.broadcast_to(A, (len(parts), *A.shape)), numerics.ELEMENTARY) / dt[:, None, None]
        read = []
        for rows, error in zip(parts, errors, strict=True):
            marks = (a[rows] if isinstance(a, np.ndarray) else a for a in more)
            read.append(op(u[rows], dt, (A + error).astype(np.result_type(A, dt)), C, D, state[rows], *marks))
        o, last = zip(*read, strict=True)
        return np.concatenate(o), np.concatenate(last)

    return run


class S4D(ModelCase):
    name = arch = "s4d"
    defaults = ("plain", "bare")
    inexact = tuple((diagonal_ssm, form, nearly_turned(getattr(diagonal_ssm, form))) for form in ("step", "parallel"))
    regimes = ("tame", "near_one", "forgetting", "saturated", "offset", "large", "dropout")

    def __init__(self) -> None:
        small: dict[str, Any] = {"d_model": 4, "n_layers": 1, "vocab_size": 7, "d_state": 6, "ffn_mult": 1}
        self.wide = {"wide": S4DConfig(**{**small, "d_model": 96})}
        # a dropout rate in the config must not act in evaluation
        self.variants = {
            "plain": S4DConfig(**small, dropout=0.25),
            "bare": S4DConfig(**{**small, "n_layers": 2, "ffn_mult": 0}, tie_head=True, head_bias=False, dropout=0.25),
            **{str(i): S4DConfig(**{**small, **row}) for i, row in enumerate(pairwise(FIELDS, lambda row: True))},
        }

    def bend(self, draw: Draw, params: Arrays) -> Arrays:
        """Δ so small that e^{ΔA} is nearly 1, and so large that it is nearly 0; a saturated gate; values and norms."""
        out = dict(params)
        for name, p in params.items():
            if name.endswith("log_dt") and draw.regime in ("near_one", "forgetting"):
                out[name] = p - 4.0 if draw.regime == "near_one" else p + 5.0
            if name.endswith("mixer.out.weight") and draw.regime == "saturated":
                gate = np.arange(len(p))[:, None] >= len(p) // 2
                out[name] = np.where(gate, 60.0 * p, p)
            if name.endswith("mixer_norm.bias") and draw.regime == "offset":
                out[name] = p + 4.0
            if name.endswith("norm.weight") and draw.regime == "large":
                out[name] = 8.0 * p
        return out

    def reach(self, setting: S4DConfig, dtype: str, state: str) -> int | None:
        """With Δ between 1e-3 and 1e-1, e^{−Δ/2} leaves a twelfth of a token after 50."""
        return None


FIELDS = {
    "ffn_mult": (0, 1, 2),
    "tie_head": (False, True),
    "head_bias": (False, True),
    "d_state": (2, 6),
    "n_layers": (1, 2),
}

CASES = (DiagonalSSM(), S4D())
