"""torch.func over every model and every public layer: grad, vmap, their composition, jvp, with states and marks; and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import unisono_torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from unisono_conformance import judge, numerics
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_torch.arrays import from_numpy

from .test_nn import MADE, D, make
from .test_second_derivatives import direction

# torch.func's own use of what torch deprecates, and its word on how fast it is
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore:There is a performance drop:UserWarning")
MODELS = [(case, variant) for case in cases().values() if isinstance(case, ModelCase) for variant in case.defaults]
MODEL = pytest.mark.parametrize(("case", "variant"), MODELS, ids=[f"{case.name}-{variant}" for case, variant in MODELS])
LAYER = pytest.mark.parametrize("name", MADE)
B, T = 2, 4
Tree = dict[str, Tensor]


def check(module: nn.Module, x: Tensor, state: Tree, masks: tuple[Tensor, Tensor], start: Callable[[], Tree]) -> None:
    """Gradients of each row by itself, from its own state and with its own marks, are those of .backward(); so is the derivative along
    a direction. start: the state that the module begins with where it is given none."""
    params = {name: p.detach() for name, p in module.named_parameters()}

    def total(y: Tensor, end: Tree) -> Tensor:
        return y.square().sum() + sum(a.square().sum() for a in end.values() if a.is_floating_point())

    def loss(leaves: Tree, x: Tensor, state: Tree | None, *masks: Tensor) -> Tensor:
        """leaves: parameters, and arrays of the state as `state NAME`."""
        rows = None if state is None else {name: leaves.get(f"state {name}", a)[None] for name, a in state.items()}
        own = {name: a for name, a in leaves.items() if name in params}
        return total(*functional_call(module, own, (x[None], rows, *(m[None] for m in masks))))

    def backward(row: int, state: Tree, *masks: Tensor) -> Tree:
        module.zero_grad()
        given = {name: a.detach().requires_grad_(a.is_floating_point()) for name, a in state.items()}
        total(*module(x[row : row + 1], given, *masks)).backward()
        leaves = {**dict(module.named_parameters()), **{f"state {name}": a for name, a in given.items()}}
        return {name: torch.zeros_like(a) if a.grad is None else a.grad for name, a in leaves.items()}

    floats = {f"state {name}": a for name, a in state.items() if a.is_floating_point()}
    shared = {**dict.fromkeys(params), **dict.fromkeys(floats, 0)}
    found = vmap(grad(loss), (shared, 0, 0, 0, 0))({**params, **floats}, x, state, *masks)
    for i in range(B):
        truth = backward(i, {name: a[i : i + 1] for name, a in state.items()}, *(m[i : i + 1] for m in masks))
        for name, a in found.items():
            judge.same(a[i], truth[name].reshape(a[i].shape), what=name)
    if not params:
        return
    alone, along = vmap(grad(loss), (None, 0, None))(params, x, None), direction(params)
    module.zero_grad()
    total(*module(x[:1], start())).backward()
    for name, p in module.named_parameters():
        judge.same(alone[name][0], torch.zeros_like(p) if p.grad is None else p.grad, what=name)
    slope = jvp(lambda params: loss(params, x[0], None), (params,), (along,))[1]
    judge.same(slope, sum((alone[name][0] * along[name]).sum() for name in params))


@MODEL
def test_models(case: Any, variant: str) -> None:
    draw = Draw(case=case.name, variant=variant, regime=case.regimes[0], batch=B, length=T, seed=3)
    config, inputs = case.setting(draw), case.inputs(draw, "float64")
    model = unisono_torch.create(config, inputs.params, dtype="float64")
    state = {name: from_numpy(a) for name, a in case.random_state(draw, inputs).items()}
    masks = torch.tensor([[False, False, True, False]] * B), torch.tensor([[True, False, True, True], [True, True, True, False]])
    tokens = from_numpy(inputs.arrays["tokens"])
    check(model, tokens, state, masks, lambda: model.init_state(1, T))
    shapes = unisono_torch.create(config, device="meta")
    logits, _ = shapes(tokens.to("meta"))
    assert logits.is_meta
    assert logits.shape == model(tokens)[0].shape


@LAYER
def test_layers(name: str) -> None:
    layer = make(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    state = {name: a.detach() for name, a in layer.init_state(B, 2 * T).items()}
    masks = torch.rand(B, T, generator=generator) < 0.3, torch.rand(B, T, generator=generator) < 0.7
    check(layer, x, state, masks, lambda: layer.init_state(1, T))
    with torch.device("meta"):
        shapes = MADE[name][0](D, **MADE[name][1])
        y, _ = shapes(torch.empty(B, T, D))
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("case", [case for case, variant in MODELS if variant == case.defaults[0]], ids=lambda case: case.name)
def test_a_step_is_exported_for_batches_of_any_size(case: ModelCase) -> None:
    draw = Draw(case=case.name, variant=case.defaults[0], regime=case.regimes[0], length=T, seed=1)
    model = unisono_torch.create(case.setting(draw), case.inputs(draw, "float32").params)

    class Step(nn.Module):
        def forward(self, token: Tensor, state: Tree) -> tuple[Tensor, Tree]:
            return model.step(token, state)

    def given(batch: int) -> tuple[Tensor, Tree]:
        return torch.arange(batch) % 3, model(torch.arange(2 * batch).reshape(batch, 2) % 3, model.init_state(batch, 9))[1]

    any_batch = torch.export.Dim("B")
    sizes = {0: any_batch}
    with torch.no_grad():
        token, state = given(2)
        exported = torch.export.export(Step(), (token, state), dynamic_shapes=(sizes, dict.fromkeys(state, sizes)), strict=False).module()
        judge.same(exported(*given(5)), model.step(*given(5)), limit=numerics.rounding("float32", 2**8))
