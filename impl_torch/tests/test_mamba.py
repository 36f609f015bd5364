"""Mamba: forms, gradients, marks, dtypes, memory, the scan beneath it."""

from __future__ import annotations

import pytest
import torch
from unisono_conformance import judge
from unisono_spec.contract.mamba import MambaConfig
from unisono_torch.ops import selective_scan
from unisono_torch.ops.linear_scan import linear_scan

from .forms import check_derivatives, check_dtypes, check_forms, check_gradients, check_poison, marks, numbers, saved_bytes

SMALL = MambaConfig(d_model=8, n_layers=2, vocab_size=11, d_state=3)
VARIANTS = {"published": SMALL, "other": SMALL.replace(bias=True, conv_bias=False, conv_width=1, tie_head=False, head_bias=True, dt_rank=3)}
ALL = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


@ALL
@pytest.mark.parametrize("marked", [False, True])
def test_forms_and_steps_agree_across_a_handed_over_state(config: MambaConfig, marked: bool) -> None:
    check_forms(config, marked)


@ALL
def test_gradients_are_the_same_in_both_forms(config: MambaConfig) -> None:
    check_gradients(config)


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(config: MambaConfig, dtype: str) -> None:
    check_dtypes(config, dtype)


def case(length: int):
    """Both forms of the op with marks, and float inputs: some Δ so large that exp(ΔA) is 0, some so small that it is nearly 1."""
    reset, valid = marks(length)
    u, dt = numbers(2, 2, length, 3, seed=length)
    B, C = numbers(2, 2, length, 2, seed=1)
    A, D, h = -numbers(3, 2).exp(), numbers(3), numbers(2, 3, 2, seed=2)

    def run(form: str, u, dt, B, C, A, D, h, **how):
        return getattr(selective_scan, form)(u, dt, A, B, C, D, h, reset, valid, **how)

    return run, [u, (4 * dt).exp(), B, C, A, D, h], valid


def test_gradcheck() -> None:
    run, given, _ = case(6)
    check_derivatives(run, given, chunk_size=4)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_what_is_not_valid_reaches_neither_outputs_nor_gradients(form: str) -> None:
    run, given, valid = case(30)
    check_poison(run, form, given, 4, valid, **({"chunk_size": 4} if form == "parallel" else {}))
    assert not run(form, *given)[0][~valid].any()


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17])
def test_a_linear_scan_and_its_derivatives(length: int) -> None:
    a, b = torch.sigmoid(numbers(2, length, 2, seed=1)), numbers(2, length, 2)
    a[:, ::3] = 0
    given = [x.requires_grad_() for x in (a, b, numbers(2, 2, seed=2))]
    h, truth = given[2], []
    for t in range(length):
        h = a[:, t] * h + b[:, t]
        truth.append(h)
    judge.same(linear_scan(*given), torch.stack(truth, 1))
    assert torch.autograd.gradcheck(linear_scan, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(linear_scan, given, fast_mode=True)


def test_the_backward_keeps_no_state_of_each_token() -> None:
    config = SMALL.replace(n_layers=1, d_state=64)
    per_token = (saved_bytes(config, 1024) - saved_bytes(config, 512)) / (512 * 2)
    # a state of each token would be inner · N float64s; one of each 64th token is a 64th of that, and activations are some tens of inner
    state = 8 * config.expand * config.d_model * config.d_state
    assert per_token < state
