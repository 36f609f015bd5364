"""States hold their own bytes and no more: no parameter's, no other state's, nothing of the sequence that was read."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_spec import create

LENGTH, MORE = 7, 30
MODELS = [(case, variant) for case in cases().values() if isinstance(case, ModelCase) for variant in case.variants]


@pytest.mark.parametrize(("case", "variant"), MODELS, ids=[f"{case.name}-{variant}" for case, variant in MODELS])
def test_states_are_their_own(case: ModelCase, variant: str) -> None:
    draw = Draw(case=case.name, variant=variant, regime=case.regimes[0], length=LENGTH)
    config, inputs = case.setting(draw), case.inputs(draw, "float64")
    model = create(config, inputs.params)
    before = {name: p.copy() for name, p in model.params.items()}
    tokens, start = inputs.arrays["tokens"], model.init_state(2, MORE)
    read = np.array([[True] * LENGTH, [True, False] * 3 + [False]])
    ends = [model.forward(tokens, start, valid=v, form=f, chunk_size=3)[1] for v in (None, read) for f in ("parallel", "recurrent")]  # pyright: ignore[reportArgumentType]
    ends += [model.step(tokens[:, 0], start, valid=v)[1] for v in (None, np.array([True, False]))]
    kept = [*model.params.values(), tokens, *start.values()]
    for state in (start, *ends):
        for name, a in state.items():
            assert a.base is None, name
            assert a.flags.owndata, name
            assert a.flags.writeable, name
        others = kept if state is not start else kept[: -len(start)]
        for a, b in [*combinations(state.values(), 2), *((a, b) for a in state.values() for b in others)]:
            assert not np.may_share_memory(a, b)
    for state in (start, *ends):
        for a in state.values():
            other = a[0].copy()
            a[1] += 1  # one row alone
            assert np.array_equal(a[0], other)
    for name, p in model.params.items():
        assert np.array_equal(p, before[name]), name
