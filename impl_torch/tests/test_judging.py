"""judge_op with functions of tensors: gradients by autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unisono_conformance import judge_op
from unisono_conformance.adapters import torch as adapter
from unisono_torch.ops import decayed_sum


def cut(x, decay, initial_state, reset=None, valid=None, chunk_size=64):
    """The same values, and no gradient of the state."""
    return decayed_sum.parallel(x, decay, initial_state.detach(), reset, valid, chunk_size)


def test_values_and_gradients():
    asked = {"op": "decayed_sum", "framework": "torch", "dtypes": ("float64", "bfloat16"), "properties": ("P1", "P7", "P9")}
    verdict = judge_op(decayed_sum.parallel, **asked)
    assert verdict.holds, verdict
    assert list(judge_op(cut, **asked).failed) == ["P7"]


def test_a_cotangent_is_widened_but_not_rounded(monkeypatch):
    """o may come wider than a rounded do; an o that is too narrow is told, and not met halfway."""
    x = np.ones((1, 2), np.float32)
    for dtype, cotangent in ((torch.float32, np.float16), (torch.bfloat16, np.float32)):
        monkeypatch.setattr(adapter, "_call", lambda _, __, arrays, *___, dtype=dtype: (arrays["x"].to(dtype), arrays["initial_state"]))
        asked = ("decayed_sum", "parallel", {"x": x, "initial_state": x}, {}, x.astype(cotangent), x, "cpu", "plain")
        if dtype == torch.float32:
            assert adapter.make().op_vjp(*asked)[2]["x"].dtype == np.float32
        else:
            with pytest.raises(TypeError, match="for a cotangent of dtype"):
                adapter.make().op_vjp(*asked)
