"""P5w against models in 16 bits that round their sums. The NumPy room has no such formats."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from unisono_conformance.adapter import Capabilities, Target
from unisono_conformance.cases.draw import Draw
from unisono_conformance.judging.judge import Disagreement
from unisono_conformance.judging.patches import Patch, patched
from unisono_conformance.properties import find
from unisono_spec import create
from unisono_spec.contract import DTYPES
from unisono_spec.ops import decayed_sum, weighted_sum

PARALLEL, WEIGHTED = decayed_sum.parallel, weighted_sum.parallel


class Narrow:
    """The spec in float32 with what layers hand on rounded, as an adapter and as its model."""

    name, known_gaps, warnings, capabilities = "narrow", None, (), Capabilities(dtypes=("bfloat16", "float16"))

    def __init__(self, *patches: Patch) -> None:
        self.patches = patches

    def build(self, config: Any, params: Any, dtype: str, *place: str) -> Narrow:
        self.model, self.dtype = create(config, params, dtype="float32"), DTYPES[dtype]
        self.model.rounded = lambda x: x.astype(self.dtype).astype(x.dtype)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with patched(self.patches):
            o, last = self.model.forward(*args, **kwargs)
        return o.astype(self.dtype), last


def judged(variant: str, dtype: str, *patches: Patch) -> None:
    find("P5w").judge(Target(cast(Any, Narrow(*patches)), dtype, "parallel"), Draw("cram", variant, "tame", 24, 16, 16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_rounded_before_it_is_read_is_seen(dtype: str) -> None:
    def hidden(*args: Any, **kwargs: Any) -> Any:
        xi, last = PARALLEL(*args, **kwargs)
        return xi.astype(DTYPES[dtype]).astype(np.float32), last

    judged("wide", dtype)
    with pytest.raises(Disagreement, match="tokens back changes the last logits of"):
        judged("wide", dtype, (decayed_sum, "parallel", hidden))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_held_in_16_bits_is_seen(dtype: str) -> None:
    """Its terms add up to more than they are: after 16 tokens roundings of the sum are many times those of what is summed."""

    def held(x: np.ndarray, s: np.ndarray, state: np.ndarray, *marks: Any, **settings: Any) -> Any:
        out = []
        for t in range(x.shape[1]):
            xi, state = WEIGHTED(x[:, t : t + 1], s[:, t : t + 1], state.astype(DTYPES[dtype]).astype(np.float32), *marks)
            out.append(xi)
        return np.concatenate(out, 1), state

    judged("wide.adaptive", dtype)
    with pytest.raises(Disagreement, match="two rows: logits"):
        judged("wide.adaptive", dtype, (weighted_sum, "parallel", held))
