"""judge_op with functions of tensors: gradients by autograd."""

from __future__ import annotations

from unisono_conformance import judge_op
from unisono_torch.ops import decayed_sum


def cut(x, decay, initial_state, reset=None, valid=None, chunk_size=64):
    """The same values, and no gradient of the state."""
    return decayed_sum.parallel(x, decay, initial_state.detach(), reset, valid, chunk_size)


def test_values_and_gradients():
    asked = {"op": "decayed_sum", "framework": "torch", "dtypes": ("float64", "bfloat16"), "properties": ("P1", "P7", "P9")}
    verdict = judge_op(decayed_sum.parallel, **asked)
    assert verdict.holds, verdict
    assert list(judge_op(cut, **asked).failed) == ["P7"]
