"""Second derivatives are right, or refused, however they are asked for: every op and every architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import unisono_torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from unisono_conformance import judge, numerics
from unisono_conformance.adapter import flatten
from unisono_conformance.adapters.torch import _call
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_torch.arrays import from_numpy

from .forms import marks

# torch.func's own use of what torch deprecates; and .backward() of a gradient, which is what is asked
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore:Using backward.. with create_graph=True:UserWarning")
Tensors = dict[str, Tensor]
CASES = [(case, variant) for case in cases().values() for variant in (case.defaults if isinstance(case, ModelCase) else case.variants)]
EACH = pytest.mark.parametrize(("case", "variant"), CASES, ids=[f"{case.name}-{variant}" for case, variant in CASES])


def function_of(case: Any, variant: str, form: str = "parallel") -> tuple[Callable[[Tensors], tuple[Tensor, ...]], Tensors]:
    """What the case computes, of its float arrays, states and parameters; and those."""
    draw = Draw(case=case.name, variant=variant, regime=case.regimes[0], batch=1, length=5, seed=2)
    setting, inputs = case.setting(draw), case.inputs(draw, "float64")
    masks = dict(zip(("reset", "valid"), (mark[:1] for mark in marks(5)), strict=True))
    how: dict[str, Any] = {"chunk_size": 3} if form == "parallel" else {}
    if not isinstance(case, ModelCase):
        given = {name: from_numpy(a) for name, a in {**inputs.arrays, **inputs.state, **inputs.params}.items()}
        leaves = {name: a for name, a in given.items() if a.is_floating_point()}

        def op(at: Tensors) -> tuple[Tensor, ...]:
            o, state = _call(case.op, form, {**given, **at, **masks}, {**setting, **how}, "plain")
            return o, *flatten(state)

        return op, leaves
    model = unisono_torch.create(setting, inputs.params, dtype="float64")
    state = {name: from_numpy(a) for name, a in case.random_state(draw, inputs).items()}
    floats = {f"state {name}": a for name, a in state.items() if a.is_floating_point()}
    tokens = from_numpy(inputs.arrays["tokens"])

    def network(at: Tensors) -> tuple[Tensor, ...]:
        start = {name: at.get(f"state {name}", a) for name, a in state.items()}
        params = {name: a for name, a in at.items() if not name.startswith("state ")}
        logits, end = torch.func.functional_call(model, params, (tokens, start), {**masks, "form": form, **how})
        return logits, *(a for a in end.values() if a.is_floating_point())

    return network, {**{name: p.detach() for name, p in model.named_parameters()}, **floats}


def loss_of(function: Callable[[Tensors], tuple[Tensor, ...]], linear: bool) -> Callable[[Tensors], Tensor]:
    """Of all outputs: linear in them, or not."""

    def loss(at: Tensors) -> Tensor:
        outputs = [o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).reshape(o.shape) for o in function(at)]
        return sum((o.sum() if linear else (o + o.square()).sum() for o in outputs), torch.zeros((), dtype=torch.float64))

    return loss


def direction(at: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(a.shape, generator=generator, dtype=a.dtype) for name, a in at.items()}


def by_grad(loss: Callable[[Tensors], Tensor], at: Tensors, along: Tensors) -> Tensors:
    leaves = {name: a.clone().requires_grad_() for name, a in at.items()}
    how: Any = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, **how)
    product = torch.stack([(g * along[name]).sum() for g, name in zip(first, leaves, strict=True)]).sum()
    return dict(zip(leaves, torch.autograd.grad(product, list(leaves.values()), **how), strict=True))


def by_backward(loss: Callable[[Tensors], Tensor], at: Tensors, along: Tensors) -> Tensors:
    leaves = {name: a.clone().requires_grad_() for name, a in at.items()}
    loss(leaves).backward(create_graph=True)
    first = {name: a.grad for name, a in leaves.items() if a.grad is not None}
    for a in leaves.values():
        a.grad = None
    sum((g * along[name]).sum() for name, g in first.items()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: torch.zeros_like(a) if a.grad is None else a.grad for name, a in leaves.items()}


def by_func(loss: Callable[[Tensors], Tensor], at: Tensors, along: Tensors) -> Tensors:
    return torch.func.jvp(torch.func.grad(loss), (at,), (along,))[1]


def by_reverse_of_func(loss: Callable[[Tensors], Tensor], at: Tensors, along: Tensors) -> Tensors:
    return torch.func.vjp(torch.func.grad(loss), at)[1](along)[0]


def by_functional(loss: Callable[[Tensors], Tensor], at: Tensors, along: Tensors) -> Tensors:
    names = list(at)

    def flat(*values: Tensor) -> Tensor:
        return loss(dict(zip(names, values, strict=True)))

    found = torch.autograd.functional.hvp(flat, tuple(at.values()), tuple(along.values()))[1]
    return dict(zip(names, found, strict=True))


WAYS = (by_grad, by_backward, by_func, by_reverse_of_func, by_functional)


def differences(loss: Callable[[Tensors], Tensor], at: Tensors, along: Tensors, step: float = 5e-5) -> Tensors:
    """Of gradients: central ones at two steps, whose errors of the second order cancel (Richardson)."""

    def central(step: float) -> list[Tensor]:
        both = []
        for way in (step, -step):
            leaves = [(a + way * along[name]).requires_grad_() for name, a in at.items()]
            given = dict(zip(at, leaves, strict=True))
            both.append(torch.autograd.grad(loss(given), leaves, allow_unused=True, materialize_grads=True))
        return [(a - b) / (2 * step) for a, b in zip(*both, strict=True)]

    return {name: (4 * fine - coarse) / 3 for name, fine, coarse in zip(at, central(step / 2), central(step), strict=True)}


def compare(found: Tensors, truth: Tensors) -> None:
    largest = max(a.abs().max() for a in truth.values() if a.numel())
    assert largest > 0
    scaled, true = ({name: a / largest for name, a in tensors.items()} for tensors in (found, truth))
    judge.same(scaled, true, numerics.difference(2**12))


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "squared"])
@EACH
def test_products_with_the_hessian(case: Any, variant: str, linear: bool) -> None:
    """A loss that is linear in the outputs sends back gradients that are constants: what a backward has saved is all that moves."""
    function, at = function_of(case, variant)
    loss, along = loss_of(function, linear), direction(at)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have one derivative
        found = by_grad(loss, at, along)
        compare(found, differences(loss, at, along))
        for way in WAYS:
            compare(way(loss, at, along), found)


@pytest.mark.parametrize("way", WAYS)
def test_fused_attention_is_differentiated_twice(way: Callable[..., Tensors]) -> None:
    function, at = function_of(cases()["transformer"], "plain")
    loss, along = loss_of(function, False), direction(at)
    with sdpa_kernel(SDPBackend.MATH):
        truth = by_grad(loss, at, along)
    compare(way(loss, at, along), truth)
