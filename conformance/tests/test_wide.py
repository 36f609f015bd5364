"""P5w against two models in 16 bits, one of which rounds ξ before it is read out. The NumPy room has no such formats."""

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
from unisono_spec.ops import decayed_sum

PARALLEL = decayed_sum.parallel


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_rounded_before_it_is_read_is_seen(dtype: str) -> None:
    def hidden(*args: Any, **kwargs: Any) -> Any:
        xi, last = PARALLEL(*args, **kwargs)
        return xi.astype(DTYPES[dtype]).astype(np.float32), last

    draw = Draw("cram", "wide", "tame", 24, 16, 16)
    honest, wrong = (cast(Any, Narrow(*patches)) for patches in ((), ((decayed_sum, "parallel", hidden),)))
    find("P5w").judge(Target(honest, dtype, "parallel"), draw)
    with pytest.raises(Disagreement, match="tokens back changes the last logits of"):
        find("P5w").judge(Target(wrong, dtype, "parallel"), draw)
