"""The kernels of the short convolution against plain operations in float64: values, all gradients, marks, a Mamba of kernels alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_torch.ops import activated_conv, short_conv


def inputs(dtype: torch.dtype, width: int, length: int, taps: int, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    valid, reset = (torch.rand(2, length, generator=made) < share for share in (0.8, 0.2))
    x = torch.where(valid[..., None], normal(2, length, width), torch.nan).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = normal(2, taps - 1, width)
    reset[1, 0], state[1] = True, torch.nan  # that nothing reads
    rest = (a.to(wide) for a in (normal(width, 1, taps), normal(width), state))
    return [a.to(device) for a in (x, *rest)], reset.to(device), valid.to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "length", "taps"), [(3, 31, 4), (130, 5, 1), (2, 2, 5)])
def test_values_and_gradients(dtype: torch.dtype, width: int, length: int, taps: int, device: str) -> None:
    given, reset, valid = inputs(dtype, width, length, taps, device)
    for marked, biased, op in (
        (True, True, short_conv),
        (False, False, short_conv),
        (True, False, activated_conv),
        (False, True, activated_conv),
    ):
        marks = (reset, valid) if marked else (None, None)
        found = []
        for how, cast in (("triton", None), ("plain", torch.float64)):
            x, *rest = (a if marked else a.nan_to_num() for a in given)
            leaves = [a.to(cast or a.dtype).requires_grad_() for a in (x, *rest)]
            x, weight, bias, state = leaves
            y, final = op.parallel(x, weight, bias if biased else None, state, *marks, implementation=how)
            outputs, wanted = [y, final][: 1 + (taps > 1)], [a for a in leaves if biased or a is not bias]
            upstream = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=device).reshape(o.shape).to(o.dtype) for o in outputs]
            gradients = torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True, allow_unused=True)
            found.append([y, final, *gradients])
        # sums of `length` products in a sequence, of 2 in all; upstream's own rounding is one more
        sums = "float64" if dtype == torch.float64 else "float32"
        limit = numerics.rounding(sums, 2**8) + (numerics.rounding("bfloat16", 2) if dtype == torch.bfloat16 else 0)
        judge.same(*([a.detach().double().cpu() for a in each] for each in found), limit=limit)
        if marked:
            assert not found[0][0][~valid].any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", ["triton", "plain", "recurrent"])
def test_a_nan_in_the_last_token_reaches_the_last_tap_alone(form: str, padded: bool, device: str) -> None:
    x, state, weight = (torch.ones(size, device=device) for size in ((2, 7, 3), (2, 3, 3), (3, 1, 4)))
    x[0, 4, 1] = x[1, 6, 1] = torch.nan
    valid = torch.tensor([[True] * 5 + [False] * 2, [True] * 7], device=device)
    weight.requires_grad_()
    given = (x, weight, None, state, None, valid) if padded else (x[:, :5], weight, None, state)
    y, _ = short_conv.recurrent(*given) if form == "recurrent" else short_conv.parallel(*given, implementation=form)
    (slope,) = torch.autograd.grad(y.sum(), weight)
    spread = torch.zeros_like(slope, dtype=torch.bool)
    spread[1, 0, 3] = True
    assert torch.equal(slope.isnan(), spread)


def longer(a: Tensor) -> Tensor:
    return torch.cat([a, a + 1], 1)[:, : a.shape[1]] if a.ndim > 1 else a


@pytest.mark.parametrize("op", [short_conv, activated_conv])
def test_arguments_lie_in_memory_as_they_like(op, device: str) -> None:
    """Every second entry of larger arrays, the bias, too, or sequences that do not lie end to end: the same bits as of their copies."""
    given, reset, valid = inputs(torch.float32, 3, 5, 4, device)
    given = [given[0].nan_to_num(), *given[1:]]
    for mark in (valid, None):
        found = []
        for laid in (lambda a: a, lambda a: torch.stack([a, a + 1], -1)[..., 0], longer):
            x, *rest = (laid(a).detach().requires_grad_() for a in given)
            y, final = op.parallel(x, *rest, reset, mark, implementation="triton")
            found.append([y, final, *torch.autograd.grad(y.sum() + final.sum(), [x, *rest])])
        assert all(torch.equal(first, other) for first, *others in zip(*found, strict=True) for other in others)


def test_a_mamba_of_kernels_alone(device: str) -> None:
    import unisono_torch
    from unisono_spec.contract.mamba import MambaConfig

    config = MambaConfig(d_model=4, n_layers=1, vocab_size=9, d_state=2)
    tokens = torch.arange(6, device=device).reshape(2, 3)
    found = []
    for how in ("triton", "plain"):
        model = unisono_torch.create(config, seed=2, dtype="float64", device=device, implementation=how)
        logits, state = model(tokens)
        logits.sum().backward()
        found.append([a.detach().cpu() for a in (logits, *state.values(), *(p.grad for p in model.parameters() if p.grad is not None))])
    judge.same(*found)
