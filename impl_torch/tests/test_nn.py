"""The public layers: what the models' mixers compute, forms, packed documents, habits of torch, errors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import unisono_torch
from torch import Tensor, nn
from unisono_conformance import judge
from unisono_spec.contract import InputError
from unisono_torch import nn as layers
from unisono_torch.layers.cram import Score

D = 16
MADE: dict[str, tuple[type, dict[str, Any]]] = {
    "linear": (layers.LinearAttention, {"n_heads": 2}),
    "rope": (layers.LinearAttention, {"n_heads": 2, "positions": "rope", "feature_map": "learned", "qk_width": 6, "bias": False}),
    "taylor2": (layers.LinearAttention, {"n_heads": 2, "feature_map": "taylor2", "qk_width": 3}),
    "window": (layers.SlidingWindowAttention, {"n_heads": 2, "window": 3, "positions": "rope"}),
    "softmax": (layers.SoftmaxAttention, {"n_heads": 2}),
    "multiscale": (layers.MultiScaleAttention, {"n_heads": 2}),
    "scales by data": (layers.MultiScaleAttention, {"n_heads": 2, "decay": "data", "gate": "vector", "rope": "numerator"}),
    "compressed": (layers.MultiScaleAttention, {"n_heads": 2, "rope": "none", "compress_every": 4, "compress_rank": 3}),
    "mamba": (layers.SelectiveSSM, {"d_state": 4}),
    "s4d": (layers.S4D, {"d_state": 4}),
    "memory": (layers.MoMGRU, {"n_banks": 2, "n_slots": 4, "d_memory": 3}),
    "noisy": (layers.MoMGRU, {"n_banks": 2, "n_slots": 4, "d_memory": 3, "router": "gumbel", "erase": "separate"}),
    "retention": (layers.CumulativeRetention, {"position_bits": 6}),
    "fixed": (layers.CumulativeRetention, {"decay": 0.75}),
    "conv": (layers.ShortConvolution, {"activation": "silu"}),
    "gated conv": (layers.GatedShortConvolution, {"mult": 2}),
}
EACH = pytest.mark.parametrize("name", MADE)


def make(name: str, **options: Any) -> Any:
    """A layer whose every parameter is random: zeros and ones would hide what they multiply."""
    kind, fields = MADE[name]
    layer = kind(D, **fields, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.4, generator=generator)
    return layer


def given(length: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, D, generator=generator, dtype=torch.float64)
    return x, torch.rand(batch, length, generator=generator) < 0.2, torch.rand(batch, length, generator=generator) < 0.7


@pytest.mark.parametrize("name", [name for name in MADE if name not in ("retention", "fixed", "conv")])
def test_a_layer_is_the_mixer_inside_a_model(name: str) -> None:
    layer, seen = make(name), []
    model: Any = unisono_torch.create(layer.layer.config.replace(vocab_size=7), dtype="float64")
    inside = model.get_submodule(layer.layer.prefix)
    inside.load_state_dict(layer.state_dict())
    inside.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs[0], outputs[0])))
    _, reset, valid = given(11)
    _, after = model(torch.arange(22).reshape(2, 11) % 7, reset=reset, valid=valid, chunk_size=4)
    y, state = layer(seen[0][0], None, reset, valid, chunk_size=4)
    assert torch.equal(y, seen[0][1])
    for part, a in state.items():
        assert torch.equal(a, after[part if part in after else f"layers.0.{part}"]), part


def test_the_rest_is_what_it_says() -> None:
    x = given(9)[0]
    conv = make("conv")
    padded = nn.functional.conv1d(nn.functional.pad(x.mT, (3, 0)), conv.weight, conv.bias, groups=D).mT
    judge.same(conv(x)[0], nn.functional.silu(padded))
    judge.same(make("fixed")(x)[0][:, 1], 0.25 * (0.75 * x[:, 0].sigmoid() + x[:, 1].sigmoid()))
    scored = make("retention")
    s = Score.forward(scored, x, torch.arange(9).expand(2, 9))
    judge.same(scored(x)[0], (s * x.sigmoid()).cumsum(1))


@EACH
def test_forms_and_steps_agree_across_a_state(name: str) -> None:
    layer = make(name)
    x, reset, valid = given(12)
    whole, end = layer(x, None, reset, valid, chunk_size=5)
    state, steps = layer.init_state(2, 12), []
    for t in range(12):
        y, state = layer.step(x[:, t], state, reset[:, t], valid[:, t])
        steps.append(y)
    read = valid[..., None].to(whole)
    judge.same(whole * read, torch.stack(steps, 1) * read)
    first, middle = layer(x[:, :7], layer.init_state(2, 12), reset[:, :7], valid[:, :7])
    second, last = layer(x[:, 7:], middle, reset[:, 7:], valid[:, 7:])
    judge.same(whole * read, torch.cat([first, second], 1) * read)
    for part in end:
        judge.same(state[part], last[part])


@EACH
def test_documents_packed_by_cu_seqlens_know_nothing_of_each_other(name: str) -> None:
    layer = make(name)
    x = given(12, 1)[0].requires_grad_()
    packed, state = layer(x, cu_seqlens=torch.tensor([0, 5, 5, 12]))
    alone, end = layer(x[:, 5:])
    judge.same(packed[:, 5:], alone)
    for part in ("h", "S", "z", "xi", "ssm", "conv"):
        if part in state:
            judge.same(state[part], end[part])
    packed[:, 5:].square().sum().backward()
    assert x.grad is not None
    assert not x.grad[:, :5].any()
    assert x.grad[:, 5:].any()


@EACH
def test_habits(name: str) -> None:
    torch.manual_seed(5)
    one = MADE[name][0](D, **MADE[name][1])
    other = MADE[name][0](D, **MADE[name][1])
    torch.manual_seed(5)
    again = MADE[name][0](D, **MADE[name][1])
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), again.parameters(), strict=True))  # torch's generator rules
    assert name == "fixed" or not all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    x = given(6)[0].float()
    torch.nn.Sequential(copy.deepcopy(one))  # is a module like any other
    for dtype in (torch.bfloat16, torch.float64):
        moved = copy.deepcopy(one).to(dtype)
        y, state = moved(x.to(dtype))
        assert y.dtype == (torch.float32 if name in ("retention", "fixed") and dtype == torch.bfloat16 else dtype)
        assert all(a.dtype in (torch.int32, torch.float32, torch.float64) for a in state.values())
    with torch.autocast("cpu", torch.bfloat16):
        assert one(x)[0].dtype == (torch.float32 if name in ("retention", "fixed") else torch.bfloat16)
    assert "d_model=16" in repr(one)


@EACH
def test_gradients_are_the_same_inside_autocast(name: str) -> None:
    """As those that are asked for outside, after the same call."""
    layer, x = make(name).float(), given(6)[0].float().requires_grad_()

    def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()], allow_unused=True, materialize_grads=True)

    with torch.autocast("cpu", torch.bfloat16):
        inside, y = gradients(layer(x)[0]), layer(x)[0]
    assert all(torch.equal(*pair) for pair in zip(inside, gradients(y), strict=True))


@EACH
def test_padding_may_hold_anything(name: str) -> None:
    """NaN where a token is not valid reaches no output, no state and no gradient, of weights neither."""
    layer, (x, _, valid) = make(name), given(5)
    assert not valid.all()
    found = []
    for hole in (0.0, torch.nan):
        leaf = torch.where(valid[..., None], x, hole).requires_grad_()
        y, state = layer(leaf, valid=valid)
        sums = y.sum() + sum(a.sum() for a in state.values() if a.is_floating_point())
        leaves = [leaf, *layer.parameters()]
        found.append([y, *state.values(), *torch.autograd.grad(sums, leaves, allow_unused=True, materialize_grads=True)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_noise_reaches_the_router() -> None:
    layer, (x, _, _) = make("noisy"), given(4)
    noise = torch.randn(2, 4, 2, dtype=torch.float64)
    assert not torch.equal(layer(x, noise=noise)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, D + 1)}, r"x: shape \(2, 4, 17\) of torch.float32, expected \[B, T, 16\] floats"),
        ({"x": torch.zeros(2, 4, D, dtype=torch.int32)}, "x: shape"),
        ({"x": torch.zeros(2, 0, D)}, "x: T is 0"),
        ({"x": [[1.0]]}, "x: .* has type list"),
        ({"reset": torch.zeros(2, 5, dtype=torch.bool)}, r"reset: shape \(2, 5\)"),
        ({"valid": torch.zeros(2, 4)}, "valid: shape"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens: .* one row"),
        ({"x": torch.zeros(1, 4, D), "cu_seqlens": [0, 3]}, r"cu_seqlens: \[0, 3\]; .* T=4"),
        ({"state": {"S": torch.zeros(1)}}, "state: .*'S'.*, expected .*position"),
        ({"chunk_size": 0}, "chunk_size: 0"),
        ({"x": np.zeros((2, 4, D), np.float32)}, "x: .* has type ndarray; give a torch.Tensor"),
        ({"valid": np.ones((2, 4), bool)}, "valid: .* has type ndarray; give a torch.Tensor"),
        ({"state": 3}, "state: 3 has type int; give arrays by name"),
        ({"state": {"S": [], "z": [], "position": []}}, r"state: position: \[\] has type list"),
        ({"x": torch.zeros(2, 4, D, device="meta")}, r"x: on meta, the model is on cpu; move it with \.to\('cpu'\)"),
        ({"valid": torch.zeros(2, 4, dtype=torch.bool, device="meta")}, "valid: on meta"),
    ],
)
def test_errors_name_field_value_and_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layers.LinearAttention(D, 2)(**{"x": torch.zeros(2, 4, D), **change})


class Scaled(layers.S4D):
    """Passes on what its base does not have."""

    def __init__(self, d_model: int, scale: float, **options: Any) -> None:
        super().__init__(d_model, scale=scale, **options)  # pyright: ignore[reportCallIssue]


def test_errors_of_sizes() -> None:
    for kind, fields in MADE.values():
        for odd in ("param_dtype", "n_layers", "layer", "kind"):
            with pytest.raises(InputError, match=f"^{odd}: no argument of this layer"):
                kind(D, **fields, **{odd: 1})
        with pytest.raises(InputError, match="did you mean 'implementation'"):
            kind(D, **fields, implementatoin="plain")
    with pytest.raises(InputError, match=r"^scale: no argument of this layer"):
        Scaled(D, scale=2.0)
    with pytest.raises(InputError, match="n_heads: 3 must divide d_model=16"):
        layers.LinearAttention(D, 3)
    with pytest.raises(InputError, match=r"lat.qk_width: 17"):
        layers.LinearAttention(D, 2, feature_map="taylor2", qk_width=17)
    with pytest.raises(InputError, match="implementation"):
        layers.S4D(D, implementation="cuda")
    with pytest.raises(InputError, match="seed"):
        layers.S4D(D, seed=-1)
    with pytest.raises(InputError, match="capacity"):
        layers.SoftmaxAttention(D, 2).init_state(2)
