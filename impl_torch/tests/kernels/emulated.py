"""The selective scan's CUDA kernels with no GPU: what the kernels' own tests ask, of lengths that pass a tile. Needs g++:
`python -m pytest impl_torch/tests/kernels/emulated.py`."""

from __future__ import annotations

import functools

import pytest
import torch
from unisono_torch.kernels.selective_scan import native, operator

from . import emulator
from . import test_selective_scan as scan

CASES = [
    scan.Case(1, 40, 33, 16, torch.float32, marked=False),
    scan.Case(2, 70, 9, 5, torch.float32),
    scan.Case(1, 290, 13, 16, torch.bfloat16, warps=64, out_dtype=torch.bfloat16),
    scan.Case(1, 130, 40, 9, torch.float16, marked=False, gated=False),
    scan.Case(1, 290, 3, 1, torch.float32, marked=False, warps=64),
]
RUNS = "program = [&] {{ {}; }}; for (int i = 0; i < programs; ++i) run_block(i); return true;"


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(native, "_there", lambda device: True)
    kernel = functools.cache(lambda name, _, constants: emulator.Kernel(native.__file__, "device.h", RUNS, "scan", folder, name, constants))
    monkeypatch.setattr(native, "_kernel", kernel)
    monkeypatch.setattr(operator, "WARPS", 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: scan.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "WARPS", case.warps)
    scan.check(case, *scan.inputs(case, "cpu"), "cpu")


def test_marks_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    scan.test_small_steps_keep_their_digits("cpu")
    scan.test_a_reset_cuts_nan("cpu")
    monkeypatch.setattr(operator, "WARPS", 64)
    scan.test_the_same_bits_twice_and_from_strided_inputs("cpu")


def test_a_wider_step_than_its_input() -> None:
    """A Mamba block's dt is float32 beside u in bfloat16."""
    case = scan.Case(1, 40, 8, 16, torch.bfloat16)
    tensors, marks = scan.inputs(case, "cpu")
    scan.check(case, {**tensors, "dt": tensors["dt"].float() * 1.00025}, marks, "cpu")
