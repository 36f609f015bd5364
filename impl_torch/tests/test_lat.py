"""LAT, Based and the Transformer baseline: forms, gradients, marks, dtypes, capacity, rotary positions.

float64 comparisons use torch.testing's default tolerance: two orders of one sum agree to far less, a wrong one to far more.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import unisono_torch
from torch import Tensor
from torch.testing import assert_close
from unisono_spec.contract import Config
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.transformer import TransformerConfig
from unisono_torch import InputError
from unisono_torch.models.base import Model
from unisono_torch.ops import linear_attention, rotary, short_conv, softmax_attention, window
from unisono_torch.ops.features import elu1

SMALL = LATConfig(d_model=8, n_layers=1, vocab_size=11, head_width=4, qk_width=4)
VARIANTS = {
    "elu1": SMALL,
    "relu": SMALL.replace(feature_map="relu", tie_head=True),
    "learned": SMALL.replace(feature_map="learned", positions="rope"),
    "window": SMALL.replace(attention="window", window=5, positions="rope"),
    "hybrid": SMALL.replace(
        n_layers=4,
        attention=("conv", "linear", "window", "softmax"),
        norm="rms",
        ffn="swiglu",
        bias=False,
        feature_map="taylor2",
        qk_width=3,
        window=2,
        positions="learned",
        max_positions=60,
    ),
    "transformer": TransformerConfig(d_model=8, n_layers=2, vocab_size=11, head_width=4),
}
ALL = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def create(config: Config, dtype: str = "float64") -> Model:
    """A model whose parameters are all far from their initial values."""
    model = unisono_torch.create(config, seed=3, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)
    return model


def tokens(length: int) -> Tensor:
    return torch.randint(0, 11, (2, length), generator=torch.Generator().manual_seed(length))


def marks(length: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(length + 1)
    return torch.rand(2, length, generator=draw) < 0.15, torch.rand(2, length, generator=draw) < 0.7


@ALL
@pytest.mark.parametrize("marked", [False, True])
def test_forms_and_steps_agree_across_a_handed_over_state(config: Config, marked: bool) -> None:
    model, given = create(config), tokens(20)
    reset, valid = marks(20) if marked else (None, None)
    some = (lambda a, b: (reset[:, a:b], valid[:, a:b])) if reset is not None and valid is not None else lambda a, b: (None, None)
    start = model.init_state(2, 60)
    truth, end = model.forward(given, start, reset, valid, form="recurrent")
    for chunk_size in (1, 3, 64):
        found, state = model.forward(given, start, reset, valid, chunk_size=chunk_size)
        assert_close(found, truth)
        assert_close(state, end)
    first, state = model.forward(given[:, :7], start, *some(0, 7), chunk_size=4)
    second, state = model.forward(given[:, 7:19], state, *some(7, 19), chunk_size=4)
    last, state = model.step(given[:, 19], state, *(None if m is None else m[:, 19] for m in (reset, valid)))
    assert_close(torch.cat([first, second, last[:, None]], 1), truth)
    assert_close(state, end)


@ALL
def test_gradients_are_the_same_in_both_forms(config: Config) -> None:
    model, given = create(config), tokens(12)
    _, state = model.forward(tokens(5), model.init_state(2, 20))
    state = {name: a.detach().requires_grad_() if a.is_floating_point() else a for name, a in state.items()}
    leaves = [*model.parameters(), *(a for a in state.values() if a.requires_grad)]
    gradients = []
    for form in ("parallel", "recurrent"):
        logits, end = model.forward(given, state, *marks(12), form=form, chunk_size=4)
        loss = logits.square().sum() + sum(a.square().sum() for a in end.values() if a.is_floating_point())
        gradients.append(torch.autograd.grad(loss, leaves))
    assert_close(gradients[0], gradients[1])


def heads(length: int, width: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, 2, width, generator=draw, dtype=torch.float64) for _ in range(3)]


def case(name: str, length: int):
    """An op's two forms of its float inputs; some of them; the marks."""
    reset, valid = marks(length)
    q, k, v = heads(length)
    count = torch.tensor([1, 3], dtype=torch.int32)
    cache = [a * (torch.arange(3)[None, :, None, None] < count[:, None, None, None]) for a in heads(3)[:2]]
    if name == "linear_attention":
        given, op = [elu1(q), elu1(k), v, heads(2)[0].abs(), heads(1)[0][:, 0].abs()], linear_attention
        return lambda form, q, k, v, S, z, **how: getattr(op, form)(q, k, v, (S, z), reset, valid, **how), given, 3, valid
    if name == "short_conv":
        weight = heads(3)[0][0].reshape(3, 4).T[:, None]
        given = [q.flatten(2), heads(2)[0].flatten(2), weight, weight[:, 0, 0]]
        return lambda form, x, s, w, b, **how: getattr(short_conv, form)(x, w, b, s, reset, valid, **how), given, 1, valid
    if name == "window":
        cache = [a.flip(1) for a in cache]
        op = window
    else:
        op, cache = softmax_attention, [torch.nn.functional.pad(a, (0, 0, 0, 0, 0, length)) for a in cache]

    def run(form, q, k, v, keys, values, **how):
        o, state = getattr(op, form)(q, k, v, (keys, values, count), reset, valid, **how)
        return o, state[:2]

    return run, [q, k, v, *cache], 3, valid


OPS = pytest.mark.parametrize("name", ["linear_attention", "short_conv", "window", "softmax_attention"])


@OPS
def test_gradcheck(name: str) -> None:
    run, given, _, _ = case(name, 6)

    def op(*given: Tensor) -> tuple[Tensor, ...]:
        o, state = run("parallel", *given, chunk_size=2)
        return o, *(state if isinstance(state, tuple) else (state,))

    assert torch.autograd.gradcheck(op, [a.clone().requires_grad_() for a in given])


@OPS
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_what_is_not_valid_reaches_neither_outputs_nor_gradients(name: str, form: str) -> None:
    run, given, sequences, valid = case(name, 30)
    how = {"chunk_size": 4} if form == "parallel" else {}
    clean = run(form, *given, **how)
    poisoned = [a.masked_fill(~valid.reshape(2, 30, *(1,) * (a.ndim - 2)), float("nan")).requires_grad_() for a in given[:sequences]]
    found = run(form, *poisoned, *given[sequences:], **how)
    assert_close(found, clean, rtol=0, atol=0)
    assert not found[0][~valid].any()
    state = found[1] if isinstance(found[1], tuple) else (found[1],)
    for gradient in torch.autograd.grad(found[0].sum() + sum(a.sum() for a in state), poisoned):
        assert gradient.isfinite().all()
        assert not gradient[~valid].any()


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(config: Config, dtype: str) -> None:
    model = create(config, dtype)
    for form in ("parallel", "recurrent"):
        logits, state = model.forward(tokens(9), form=form)
        assert logits.dtype == getattr(torch, dtype)
        assert logits.isfinite().all()
        assert {a.dtype for a in state.values()} <= {torch.float32, torch.int32}


def test_elu1_is_not_zero_where_the_naive_form_is() -> None:
    x = torch.tensor([-20.0, -8.0, 3.0], dtype=torch.bfloat16)
    assert_close(elu1(x), torch.cat([x[:2].exp(), x[2:] + 1]), rtol=0, atol=0)
    assert (elu1(x) > 0).all()


def test_turns_are_right_at_every_int32() -> None:
    position = torch.tensor([0, 1, 255, 256, 200_000, 1_000_000, 2**31 - 1], dtype=torch.int32)
    # 80-bit or wider where the machine has it; float64 alone is right to 2^31 · 2^-53
    angle = position.numpy()[:, None].astype(np.longdouble) * 10000.0 ** (-np.arange(4) / 4)
    for dtype in (torch.float32, torch.float64):
        # four turns of one rounding each, three products of two each; tables and this angle err by 2^31 · 2^-53 at most
        bound = 16 * torch.finfo(dtype).eps + 2.0**-20
        cos, sin = rotary.turn(position, 8, dtype=dtype)
        assert np.abs(cos.numpy() - np.cos(angle)).max() < bound
        assert np.abs(sin.numpy() - np.sin(angle)).max() < bound


def test_values_of_one_come_back_as_one() -> None:
    q, k, v = heads(50)
    state = (torch.zeros(2, 2, 2, 2, dtype=torch.float64), torch.zeros(2, 2, 2, dtype=torch.float64))
    o, (_, z) = linear_attention.parallel(elu1(q), elu1(k), torch.ones_like(v), state)
    read = (elu1(q)[:, -1] * z).sum(-1, keepdim=True)
    assert_close(o[:, -1], (read / (read + linear_attention.EPS)).expand(-1, -1, 2))


def test_saved_memory_is_linear_in_length() -> None:
    def saved(length: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        model = create(VARIANTS["elu1"].replace(n_layers=3, attention=("linear", "window", "conv"), window=5))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.forward(tokens(length), None, *marks(length))
        return sum(sizes.values())

    assert saved(4096) < 5 * saved(1024)  # 16 times, were there a T×T tensor


def test_bad_input_is_named_with_a_remedy() -> None:
    model = create(VARIANTS["transformer"])
    with pytest.raises(InputError, match="capacity: token 6 of a sequence, the cache holds 5; give init_state a larger"):
        model.forward(tokens(6), model.init_state(2, 5))
    _, state = model.forward(tokens(5))
    with pytest.raises(InputError, match="capacity: token 6"):
        model.step(tokens(1)[:, 0], state)
    with pytest.raises(InputError, match="max_positions: token 61 of a sequence, 60 positions were learned; use positions='rope'"):
        create(VARIANTS["hybrid"]).forward(tokens(61))
    with pytest.raises(InputError, match="no Triton kernel of window"):
        window.parallel(*heads(3), (*heads(2)[:2], torch.tensor([0, 0])), implementation="triton")
