"""LAT, Based and the Transformer baseline: forms, gradients, marks, dtypes, capacity, rotary positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from unisono_conformance import judge, numerics
from unisono_spec.contract import Config
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.transformer import TransformerConfig
from unisono_torch import InputError
from unisono_torch.ops import linear_attention, rotary, short_conv, softmax_attention, window
from unisono_torch.ops.features import elu1
from unisono_torch.ops.transforms import attention

from .forms import check_derivatives, check_dtypes, check_forms, check_gradients, check_poison, create, marks, numbers, saved_bytes, tokens

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


@ALL
@pytest.mark.parametrize("marked", [False, True])
def test_forms_and_steps_agree_across_a_handed_over_state(config: Config, marked: bool) -> None:
    check_forms(config, marked)


@ALL
def test_gradients_are_the_same_in_both_forms(config: Config) -> None:
    check_gradients(config)


def heads(length: int, width: int = 2) -> list[Tensor]:
    return list(numbers(3, 2, length, 2, width, seed=length))


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
    check_derivatives(run, given, chunk_size=2)


@OPS
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_what_is_not_valid_reaches_neither_outputs_nor_gradients(name: str, form: str) -> None:
    run, given, sequences, valid = case(name, 30)
    how = {"chunk_size": 4} if form == "parallel" else {}
    check_poison(run, form, given, sequences, valid, **how)
    assert not run(form, *given, **how)[0][~valid].any()


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(config: Config, dtype: str) -> None:
    check_dtypes(config, dtype)


def test_elu1_is_not_zero_where_the_naive_form_is() -> None:
    x = torch.tensor([-20.0, -8.0, 3.0], dtype=torch.bfloat16)
    assert torch.equal(elu1(x), torch.cat([x[:2].exp(), x[2:] + 1]))
    assert (elu1(x) > 0).all()


def test_gradients_of_elu1() -> None:
    """Its slope at 0 is 1 from both sides; a NaN of padding stays where it is."""
    x = numbers(6).requires_grad_()
    assert torch.autograd.gradcheck(elu1, x)
    assert torch.autograd.gradgradcheck(elu1, x)
    x = torch.tensor([-1.0, 0.0, 2.0, torch.nan], requires_grad=True)
    torch.where(x.isnan(), 0, elu1(x)).sum().backward()
    judge.same(x.grad, torch.tensor([-1.0, 0, 0, -torch.inf]).exp(), numerics.rounding("float32", 4))


def test_turns_are_right_at_every_int32() -> None:
    position = torch.tensor([0, 1, 255, 256, 200_000, 1_000_000, 2**31 - 1], dtype=torch.int32)
    # 80-bit or wider where the machine has it; float64 alone is right to 2^31 · 2^-53
    angle = position.numpy()[:, None].astype(np.longdouble) * 10000.0 ** (-np.arange(4) / 4)
    for dtype in (torch.float32, torch.float64):
        # four turns of one rounding each, three products of two each; tables and this angle err by 2^31 · 2^-53 at most
        bound = numerics.rounding(str(dtype).removeprefix("torch."), 2**5) + numerics.rounding("float64", 2**33)
        cos, sin = rotary.cos_sin(position, 8, dtype=dtype)
        assert np.abs(cos.numpy() - np.cos(angle)).max() < bound
        assert np.abs(sin.numpy() - np.sin(angle)).max() < bound


def test_values_of_one_come_back_as_one() -> None:
    q, k, v = heads(50)
    state = (torch.zeros(2, 2, 2, 2, dtype=torch.float64), torch.zeros(2, 2, 2, dtype=torch.float64))
    o, (_, z) = linear_attention.parallel(elu1(q), elu1(k), torch.ones_like(v), state)
    read = (elu1(q)[:, -1] * z).sum(-1, keepdim=True)
    judge.same(o[:, -1], (read / (read + linear_attention.EPS)).expand(-1, -1, 2))


def test_saved_memory_is_linear_in_length() -> None:
    config = SMALL.replace(n_layers=3, attention=("linear", "window", "conv"), window=5)
    assert saved_bytes(config, 4096) < 5 * saved_bytes(config, 1024)  # 16 times, were there a T×T tensor


def test_bad_input_is_named_with_a_remedy() -> None:
    model = create(VARIANTS["transformer"])
    with pytest.raises(InputError, match="capacity: token 6 of a sequence, the cache holds 5; give init_state a larger"):
        model.forward(tokens(6), model.init_state(2, 5))
    _, state = model.forward(tokens(5))
    with pytest.raises(InputError, match="capacity: token 6"):
        model.step(tokens(1)[:, 0], state)
    with pytest.raises(InputError, match="max_positions: token 61 of a sequence, 60 positions were learned; use positions='rope'"):
        create(VARIANTS["hybrid"]).forward(tokens(61))
    q, k, v = heads(3)
    with pytest.raises(InputError, match="no Triton kernel of softmax_attention"):
        softmax_attention.parallel(q, k, v, (k[:, :2], v[:, :2], torch.tensor([0, 0])), implementation="triton")


@pytest.mark.parametrize("compiled", [False, True])
def test_softmax_from_the_start_needs_no_mask(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    given = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        given.append((mask is None, is_causal))
        return q @ k.mT @ v

    model = create(TransformerConfig(d_model=8, n_layers=1, vocab_size=11, head_width=4))
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attend)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    run(tokens(5))
    assert given == [(True, True)]


@pytest.mark.parametrize("hidden", [False, True])
def test_softmax_of_fresh_sequences_needs_no_mask(monkeypatch: pytest.MonkeyPatch, hidden: bool) -> None:
    """Padding behind, gaps, tokens after padding, none at all: outputs, states and gradients of the definition, by causal attention,
    where marks can be read and where, as in a compiled graph, they cannot."""
    given = []

    def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        given.append((mask is None, is_causal))
        return attention(q, k, v, mask, is_causal)

    monkeypatch.setattr("unisono_torch.ops.softmax_attention.attention", seen)
    if hidden:
        monkeypatch.setattr("unisono_torch.ops.softmax_attention.readable", lambda a: False)
    padded = torch.arange(6) < torch.tensor([6, 3, 1, 0])[:, None]
    gap = padded.clone()
    gap[0, 2] = False
    late = padded.flip(1)
    for valid in (padded, gap, late):
        found = {}
        for form, more in (("parallel", {"fresh": True}), ("recurrent", {})):
            inputs = [torch.where(valid[..., None, None], numbers(4, 6, 2, 3, seed=i), torch.nan).requires_grad_() for i in range(3)]
            cache = (*torch.zeros(2, 4, 8, 2, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.int32))
            given.clear()
            o, state = getattr(softmax_attention, form)(*inputs, cache, None, valid, **more)
            if form == "parallel":
                assert given == [(True, True)]
            (o.square().sum() + sum(a.square().sum() for a in state[:2])).backward()
            found[form] = [o, *state, *(a.grad for a in inputs)]
        for mine, defined in zip(found["parallel"], found["recurrent"], strict=True):
            assert mine.dtype == defined.dtype
            judge.same(mine, defined)
