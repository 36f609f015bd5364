"""MoM-GRU's CUDA kernels with no GPU: what the kernels' own tests ask, by several programs that wait for each other. Needs g++:
`python -m pytest impl_torch/tests/kernels/emulated_gru.py`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from unisono_torch.kernels.mom_gru import loop, native, operator

from . import emulator
from . import test_mom_gru as gru

CASES = [
    gru.Case(2, 6, 11, 2, 5, 6, 7, "separate", drawn=True, marked=True),
    gru.Case(2, 9, 11, 2, 5, 6, 7, marked=True),
    gru.Case(17, 3, 40, 3, 40, 9, 5, marked=True),
    gru.Case(1, 2, 3, 3, 1, 1, 5),
    gru.Case(1, 6, 12, 1, 250, 126, 5),
    gru.Case(3, 5, 20, 1, 40, 8, 33),
    gru.Case(10, 6, 11, 2, 5, 6, 7, "separate", drawn=True, marked=True),  # by two teams
    gru.Case(120, 2, 11, 2, 5, 6, 7),  # as many as evaluation reads at once
]
PROGRAMS = 5


RUNS = "kernel = [=] {{ {}; }}; return run_all(programs, each, shared_bytes);"
STOPPED = RUNS.replace("shared_bytes", "shared_bytes, true")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    _run(monkeypatch, tmp_path_factory, RUNS)
    monkeypatch.setattr(native, "_there", lambda device: True)
    monkeypatch.setattr(operator, "_multiprocessors", lambda device: PROGRAMS)
    monkeypatch.setattr(native, "COLUMNS", 16)
    monkeypatch.setattr(operator, "SEGMENT", 4)
    monkeypatch.setattr(operator, "interpreted", lambda: False)


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, runs: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    kernel = functools.cache(lambda name, _, constants: emulator.Kernel(native.__file__, "programs.h", runs, name, folder, name, constants))
    monkeypatch.setattr(native, "_kernel", kernel)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: gru.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gru, "interpreted", lambda: False)
    gru.test_values_and_gradients(case, "cpu")


@pytest.mark.parametrize(
    ("programs", "case"),
    [
        (5, gru.Case(3, 6, 6, 2, 3, 1, 2, marked=True)),  # the last program has banks alone
        (7, gru.Case(1, 6, 6, 1, 3, 1, 4)),  # two have nothing
        (7, gru.Case(1, 5, 3, 1, 3, 6, 4)),  # some of c alone
    ],
    ids=str,
)
def test_programs_that_stand_still(
    programs: int, case: gru.Case, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What one has not read yet is not overwritten, however late it is."""
    _run(monkeypatch, tmp_path_factory, STOPPED)
    monkeypatch.setattr(operator, "_multiprocessors", lambda device: programs)
    monkeypatch.setattr(gru, "interpreted", lambda: False)
    gru.test_values_and_gradients(case, "cpu")


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("case", [gru.Case(2, 5, 11, 2, 5, 6, 7), gru.Case(3, 4, 6, 2, 3, 1, 2), gru.Case(17, 3, 10, 1, 2, 9, 2)], ids=str)
def test_tokens_one_by_one(
    case: gru.Case, stopped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What one call leaves of what programs exchange, the next takes for nothing."""
    if stopped:
        _run(monkeypatch, tmp_path_factory, STOPPED)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gru.decoded(case, dtype, "cpu")


def test_marks_pieces_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    gru.test_a_reset_cuts_nan("cpu")
    gru.test_where_nothing_is_valid_no_weight_has_a_gradient("cpu")
    gru.test_without_gradients_in_pieces_and_launches("cpu", monkeypatch)
    gru.test_the_same_bits_twice("cpu")


@pytest.mark.parametrize("value", [torch.inf, 1e38])
def test_what_exceeds_float32(value: float) -> None:
    """What programs exchange stays infinite, or becomes NaN, where plain operations' does."""
    given, _, sizes = gru.inputs(gru.Case(1, 3, 4, 2, 3, 4, 3), "cpu")
    h, M, x, _, *weights = (a.float() for a in given)
    weights = gru.Weights._make(weights)
    weights.after_bias[:] = value
    found: list[Any] = [how(h, M, x, None, None, None, sizes, weights)[0] for how in (loop, gru.folded)]
    assert torch.equal(found[0].isfinite(), found[1].isfinite())
