"""Decoding on buffers that stay: steps of few launches against the spec, texts against `generate`'s, on a GPU through graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from unisono_conformance import judge
from unisono_spec.contract import Config, InputError, init_params
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.contract.s4d import S4DConfig
from unisono_spec.contract.sampling import GREEDY, Sampling, choose
from unisono_spec.contract.transformer import TransformerConfig
from unisono_torch import create
from unisono_torch.arrays import numpy_state
from unisono_torch.decoding import Decoder, decoder, parts
from unisono_torch.decoding import fused as fused_module
from unisono_torch.decoding.fused import fused
from unisono_torch.decoding.parts import Held
from unisono_torch.kernels.decode import attention, project, windows
from unisono_torch.kernels.decode.project import MOST
from unisono_torch.kernels.registry import interpreted
from unisono_torch.models.base import Model

from .together import together

LAT = LATConfig(d_model=12, n_layers=2, vocab_size=30, head_width=6, qk_width=4, ffn_mult=2, window=5, conv_mult=2)
CONFIGS: dict[str, Config] = {
    "lat": LAT,
    "rope": LAT.replace(
        attention=["linear", "window"], window=8, feature_map="relu", positions="rope", norm="rms", ffn="swiglu", bias=False, head_norm=True
    ),
    "taylor2": LAT.replace(attention=["conv", "linear"], feature_map="taylor2", positions="rope", tie_head=True, head_bias=False),
    "learned": LAT.replace(attention=["softmax", "linear"], feature_map="learned", positions="learned", max_positions=40, ffn="swiglu"),
    "transformer": TransformerConfig(d_model=12, n_layers=1, vocab_size=30, head_width=6, ffn_mult=2),
    "mamba": MambaConfig(d_model=6, n_layers=2, vocab_size=30, d_state=3, norm_eps=1e-3),
    "s4d": S4DConfig(d_model=6, n_layers=2, vocab_size=30, d_state=6, ffn_mult=2),
    "adaptive": CRAMConfig(scheme="adaptive", d_model=8, n_layers=2, vocab_size=30, position_bits=6),
    "exclusive": CRAMConfig(scheme="adaptive", d_model=20, n_layers=1, vocab_size=30, position_bits=6, exclusive=True),
    "fixed": CRAMConfig(d_model=8, n_layers=1, vocab_size=30),
    "retained": CRAMConfig(
        scheme="adaptive", d_model=20, n_layers=2, vocab_size=30, position_bits=6, input_norm=True, learned_decay=True, normalised=True
    ),
    "channels": CRAMConfig(
        scheme="adaptive", d_model=20, n_layers=2, vocab_size=30, position_bits=6, channel_weights=True, learned_decay=True, skip=True
    ),
    "after": CRAMConfig(scheme="adaptive", d_model=8, n_layers=2, vocab_size=30, position_bits=6, residual="after"),
    "plain": CRAMConfig(d_model=8, n_layers=1, vocab_size=30),
    "wide": LAT.replace(attention="window", window=7, n_layers=1, positions="rope"),
    "infinity": InfinityFormerConfig(d_model=8, n_layers=1, n_heads=2, d_ffn=8, vocab_size=30),
    "numerator": InfinityFormerConfig(
        d_model=8, n_layers=1, n_heads=2, d_ffn=8, vocab_size=30, rope="numerator", decay="data", gate="vector", feature_map="learned"
    ),
    "stack": MARUConfig(
        d_model=8,
        n_layers=2,
        vocab_size=30,
        head_hidden=8,
        d_state=4,
        n_banks=2,
        n_slots=3,
        d_memory=4,
        router_hidden=4,
        prenorm=True,
        erase="separate",
        router="gumbel",
        conv_width=1,
    ),
    "maru": MARUConfig(d_model=8, vocab_size=30, head_hidden=8, d_state=4, n_banks=2, n_slots=3, d_memory=4, router_hidden=4),
}
PLAIN = ("plain",)  # in a graph, but of the step's own operations
HOW = {"maru": "triton", "stack": "triton", "plain": "plain"}  # cells by kernel
WARM = Sampling(temperature=1.5, seed=7)
FIRST = 6  # tokens before the decoder takes over


def made(config: Config, device: str, **how: Any) -> tuple[Model, dict[str, np.ndarray]]:
    noise = np.random.default_rng(3)
    params = {name: p + np.float32(0.1) * noise.standard_normal(p.shape, np.float32) for name, p in init_params(config, seed=3).items()}
    return create(config, params, device=device, **how), params


def text(length: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 30, (batch, length))


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of more than four tokens by pieces of four slots, each in two turns."""
    for holder, what, value in ((fused_module, "MOST_WINDOW", 4), (windows, "PIECE", 4), (windows, "BLOCK", 2)):
        monkeypatch.setattr(holder, what, value)


FEW = [(name, 2, MOST, "") for name in CONFIGS]
# read by products that are one launch each, and by a library's
SOME = ("taylor2", "s4d", "numerator", "mamba") if interpreted() else CONFIGS
SIZES = (2, 1) if interpreted() else (MOST + 1, MOST)
FORMS = {"slabs": CONFIGS, "tiles": CONFIGS, "fronts": CONFIGS, "": SOME}
ALIKE = ("retained", "wide", "plain")  # whose products are others'
MANY = [
    (name, *SIZES, form) for form, names in FORMS.items() for name in names if name not in ALIKE or form == "fronts" or not interpreted()
]


@pytest.mark.parametrize(("name", "batch", "most", "joined"), FEW + MANY)
def test_steps_are_those_of_the_spec(name: str, batch: int, most: int, joined: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every token and the state after the last, from a state after others."""
    monkeypatch.setattr(project, "MOST", most)
    monkeypatch.setattr(parts, "joined", lambda model, batch: joined)
    if name == "wide":
        in_pieces(monkeypatch)
    if interpreted():  # heads are wide enough for two programs each
        monkeypatch.setattr(attention, "_slices", lambda owners, width: 2 - width % 2)
        if name == "lat":  # … and features many enough for two turns
            monkeypatch.setattr(attention, "FEATURES", (2, 2))
        if name in ("rope", "taylor2", "infinity", "transformer", "mamba", "maru", "stack", "channels", "wide"):
            together(monkeypatch)
            monkeypatch.setattr(project, "at_once", lambda: True)
    model, params = made(CONFIGS[name], device, implementation=HOW.get(name, "auto"))
    alone, _ = made(CONFIGS[name], device, implementation="plain")
    tokens = text(FIRST + 3, batch)
    with torch.no_grad():
        _, before = alone(torch.as_tensor(tokens[:, :FIRST], device=device), alone.init_state(batch, 32))
        made_here = Decoder(model, before, "greedy")
        for key, own in made_here.state.items():
            own.copy_(before[key])  # making a graph advances it
        logits = [made_here.one(token).clone() for token in torch.as_tensor(tokens[:, FIRST:], device=device).T]
    given = {"tokens": tokens[:, FIRST:], **numpy_state(before)}
    judge.model(CONFIGS[name], params, given, (torch.stack(logits, 1).cpu().numpy(), numpy_state(made_here.state)))
    fused_here = fused(model, before, Held()) is not None
    assert fused_here == (name not in PLAIN)


CUT = Sampling(0.7, top_k=9, top_p=0.8, seed=2**64 - 1)
TEXTS = {
    "lat-greedy": ("lat", GREEDY),
    "lat-cut": ("lat", dataclasses.replace(CUT, repetition_penalty=1.3)),
    "fixed-warm": ("fixed", WARM),
    "fixed-penalised": ("fixed", Sampling(repetition_penalty=0.2)),
}


@pytest.mark.parametrize(("name", "sampling"), TEXTS.values(), ids=TEXTS)
def test_texts_are_those_of_the_host(name: str, sampling: Sampling, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of any length, in inference mode and outside it, and with the state that goes on."""
    model, _ = made(CONFIGS[name], device)
    alone, _ = made(CONFIGS[name], "cpu", implementation="plain")
    monkeypatch.setattr(decoder, "BLOCK", 3)
    monkeypatch.setattr(decoder, "FEWEST", 1)
    with torch.no_grad():
        logits, state = alone(torch.as_tensor(text(5)))
    truth = alone.generate(text(5), 7, sampling, n_generated=3)
    before, seen = {key: a.to(device) for key, a in state.items()}, None
    if sampling.repetition_penalty != 1:
        seen = np.zeros((2, 30), bool)
        np.put_along_axis(seen, text(5), True, 1)
    first, _ = choose(logits[:, -1].numpy(), sampling, 3, seen)

    def follow(token: np.ndarray, state: Any, number: int, count: int) -> Any:
        if seen is not None:
            np.put_along_axis(seen, token[:, None], True, 1)
        return decoder.follow(model, token, state, sampling, number, count, seen) or pytest.fail("no decoder")

    with torch.inference_mode():
        ids, ties, after = follow(first, before, 4, 4)
    if seen is not None:
        np.put_along_axis(seen, ids, True, 1)
    again, _, end = follow(ids[:, -1], after, 8, 2)
    assert np.array_equal(np.concatenate([ids, again], 1), truth.tokens[:, 1:])
    assert ties.shape == ids.shape
    assert np.array_equal(end["position"].cpu(), truth.state["position"]) if "position" in end else True
    assert all(a.dtype == state[key].dtype for key, a in after.items())


def test_no_rows_and_weights_of_another_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequences have no ids; a decoder of weights that are gone is not asked."""
    monkeypatch.setattr(decoder, "FEWEST", 1)
    monkeypatch.setattr(decoder, "_serves", lambda model: True)
    model, _ = made(CONFIGS["transformer"], device)
    for law in (GREEDY, WARM, Sampling(repetition_penalty=2.0)):
        assert model.generate(text(3)[:0], 4, law).tokens.shape == (0, 4)
    more = dataclasses.replace(WARM, top_k=2**70)  # than there are keeps all
    assert np.array_equal(model.generate(text(3), 2, more).tokens, model.generate(text(3), 2, WARM).tokens)
    before = model.generate(text(3), 3).tokens
    moved = {name: -a.clone() for name, a in model.state_dict().items()}
    model.load_state_dict(moved, assign=True)
    other, _ = made(CONFIGS["transformer"], device)
    other.load_state_dict(moved)
    after = model.generate(text(3), 3).tokens
    assert len({key[-1] for key in decoder._decoders[model]}) == 1
    assert np.array_equal(after, other.generate(text(3), 3).tokens)
    assert not np.array_equal(after, before)


def test_a_penalty_goes_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` by a decoder says which ids each text holds then."""
    monkeypatch.setattr(decoder, "FEWEST", 1)
    monkeypatch.setattr(decoder, "_serves", lambda model: True)
    law = Sampling(repetition_penalty=0.2)
    found, true = (made(CONFIGS["fixed"], where)[0] for where in (device, "cpu"))
    tokens = text(5), 6, law
    found.generate(text(5), 2, dataclasses.replace(law, repetition_penalty=1.0))  # by another decoder
    a = found.generate(*tokens)
    monkeypatch.setattr(decoder, "_serves", lambda model: False)
    b = true.generate(*tokens)
    assert np.array_equal(a.tokens, b.tokens)
    assert a.seen is not None
    assert b.seen is not None
    assert np.array_equal(a.seen, b.seen)
    assert any(key[1] for key in decoder._decoders[found])


@pytest.mark.parametrize(
    ("law", "dtype"), [(GREEDY, "float32"), (WARM, "float32"), (Sampling(repetition_penalty=2.0), "float32"), (GREEDY, "float64")]
)
def test_damaged_logits_are_named(law: Sampling, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After more tokens, which read what was chosen beside a NaN."""
    monkeypatch.setattr(decoder, "FEWEST", 1)
    model, _ = made(CONFIGS["s4d"], device, dtype=dtype)
    with torch.no_grad():
        model.get_parameter("head.weight").fill_(torch.nan)
    state, seen = model.init_state(2), None if law.repetition_penalty == 1 else np.zeros((2, 30), bool)
    with pytest.raises(InputError, match="NaN at generated token 5"):
        decoder.follow(model, text(1)[:, 0], state, law, 5, 3, seen)


@pytest.mark.parametrize(("batch", "length"), [(1, 200), (3, 88)])
def test_long_caches_in_pieces(batch: int, length: int, device: str) -> None:
    """Softmax attention of a cache that several programs read, against plain operations."""
    from unisono_torch.kernels.decode import attention
    from unisono_torch.kernels.decode.project import Finish
    from unisono_torch.ops import softmax_attention

    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(batch, 2, 8, generator=generator).to(device) for _ in range(3))
    keys, values = (torch.randn(batch, 700, 2, 8, generator=generator).to(device) for _ in range(2))
    # of 88, 218 and 348 tokens, the first stands at the beginning of a piece of 44
    count = torch.tensor([length + 130 * row for row in range(batch)], dtype=torch.int32, device=device)
    held = torch.arange(700, device=device) < count[:, None]
    keys, values = (torch.where(held[..., None, None], a, 0) for a in (keys, values))
    true, (true_k, true_v, _) = softmax_attention.step(*(a.double() for a in (q, k, v)), (keys.double(), values.double(), count))
    alone = Finish(None, None, 2 * batch, count.device)
    o = attention.softmax_step(torch.cat([a.flatten(1) for a in (q, k, v)], 1), keys, values, count, None, alone, None)
    from unisono_conformance import numerics

    judge.same(o.double().unflatten(1, (2, 8)).cpu(), true.cpu(), numerics.rounding("float32", 2**10))
    judge.same(keys.double().cpu(), true_k.cpu())
    judge.same(values.double().cpu(), true_v.cpu())


def test_the_configs_are_of_every_architecture() -> None:
    from unisono_spec.contract import ARCHITECTURES

    assert {config.arch for config in CONFIGS.values()} == set(ARCHITECTURES)
    assert all(dataclasses.is_dataclass(config) for config in CONFIGS.values())
