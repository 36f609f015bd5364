"""S4D: forms, gradients, marks, dtypes, small and large ΔA, memory."""

from __future__ import annotations

import pytest
import torch
from unisono_conformance import judge, numerics
from unisono_spec.contract.s4d import S4DConfig
from unisono_torch.ops import diagonal_ssm

from .forms import check_derivatives, check_dtypes, check_forms, check_gradients, check_poison, marks, numbers, saved_bytes

SMALL = S4DConfig(d_model=6, n_layers=2, vocab_size=11, d_state=6)
VARIANTS = {"ffn": SMALL, "no ffn": SMALL.replace(ffn_mult=0, tie_head=True, head_bias=False, d_state=2)}
ALL = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


@ALL
@pytest.mark.parametrize("marked", [False, True])
def test_forms_and_steps_agree_across_a_handed_over_state(config: S4DConfig, marked: bool) -> None:
    check_forms(config, marked, length=40)


@ALL
def test_gradients_are_the_same_in_both_forms(config: S4DConfig) -> None:
    check_gradients(config)


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(config: S4DConfig, dtype: str) -> None:
    check_dtypes(config, dtype)


def case(length: int, marked: bool = True, dtype: torch.dtype = torch.float64):
    """Both forms of the op, and float inputs."""
    reset, valid = marks(length) if marked else (None, None)
    u, dt, D = numbers(2, length, 2, seed=length), torch.tensor([1e-3, 1e-1], dtype=dtype), numbers(2)
    A = torch.stack([-numbers(2, 3).exp(), torch.pi * torch.arange(3.0).expand(2, 3)], -1)
    C, h = numbers(2, 3, 2, seed=1), numbers(2, 2, 3, 2, seed=2)

    def run(form: str, u, dt, A, C, D, h, **how):
        return getattr(diagonal_ssm, form)(u, dt, A, C, D, h, reset, valid, **how)

    return run, [a.to(dtype) for a in (u, dt, A, C, D, h)], valid


@pytest.mark.parametrize("marked", [False, True])
def test_gradcheck(marked: bool) -> None:
    run, given, _ = case(6, marked)
    check_derivatives(run, given, chunk_size=4)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_what_is_not_valid_reaches_neither_outputs_nor_gradients(form: str) -> None:
    run, given, valid = case(30)
    assert valid is not None
    check_poison(run, form, given, 1, valid, **({"chunk_size": 4} if form == "parallel" else {}))
    assert not run(form, *given)[0][~valid].any()


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_states_that_never_fade(form: str) -> None:
    """(e^{ΔA} − 1) / A is Δ at A = 0, and its slope is Δ²/2: the state after two tokens, and its gradient."""
    run, (u, dt, A, C, D, h), _ = case(2, marked=False)
    A = torch.zeros_like(A).requires_grad_()
    _, state = run(form, u, dt, A, C, D, torch.zeros_like(h))
    judge.within(state[..., 0].detach(), (dt * u.sum(1))[..., None].expand(2, 2, 3), numerics.formula("float64", 2))
    (slope,) = torch.autograd.grad(state[..., 0].sum(), A)
    true = dt.square() * (1.5 * u[:, 0] + 0.5 * u[:, 1]).sum(0)
    judge.within(slope[..., 0], true[:, None].expand(2, 3), numerics.formula("float64", 8))


def test_float32_keeps_its_digits_over_a_chunk() -> None:
    run, given, _ = case(200, marked=False, dtype=torch.float32)
    given[2] = given[2] * torch.tensor([0.01, 30.0])  # slow to fade, nine turns a token at most
    truth, end = run("recurrent", *(a.double() for a in given))
    found, state = run("parallel", *given, chunk_size=64)
    # of the largest value: those near zero are differences of larger terms
    for a, b in ((found, truth), (state, end)):
        judge.within(a, b, numerics.formula("float32", 200) * b.abs().max())


def test_saved_memory_is_linear_in_length() -> None:
    assert saved_bytes(SMALL, 4096) < 5 * saved_bytes(SMALL, 1024)  # 16 times, were there a T×T tensor
