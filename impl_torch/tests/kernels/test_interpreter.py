"""Triton's interpreter, made quicker: what it does to the language ends with a launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_s
from triton.runtime.errors import InterpreterError


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _doubled(x, out, N: tl.constexpr, DIES: tl.constexpr):
    i = tl.arange(0, N)
    tl.static_assert(not DIES)
    tl.store(out + i, tl.cumsum(_twice(tl.load(x + i)), 0))


def test_the_language_is_whole_after_a_launch(interpreter: None) -> None:
    before = {(part, name): value for part in (tl, tl.core, tl.math, tl.tensor) for name, value in vars(part).items()}
    doubled: Any = _doubled
    x = torch.arange(8.0)
    out = torch.zeros(8)
    doubled[(1,)](x, out, N=8, DIES=False)
    assert torch.equal(out, (2 * x).cumsum(0))
    with pytest.raises(InterpreterError):
        doubled[(1,)](x, out, N=8, DIES=True)
    after = {(part, name): value for part in (tl, tl.core, tl.math, tl.tensor) for name, value in vars(part).items()}
    # Triton 3.4 never gives the language back
    assert after == before or not hasattr(triton_s, "_LangPatchScope")
    doubled[(1,)](out, out, N=8, DIES=False)
    assert torch.equal(out, (2 * (2 * x).cumsum(0)).cumsum(0))
