"""Two layers of each architecture wired by hand, one token after the other: with a reset, a token that is not read, dropout, and a
hand-over. Both forms share a model's wiring, so no comparison of them can judge it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import checking
import numpy as np
import pytest
from formulas import P, elu1, gelu, gelu_tanh, linear, norm, rotated, sigma, softmax
from unisono_spec.contract import Config, init_params
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.contract.s4d import S4DConfig
from unisono_spec.contract.transformer import TransformerConfig
from unisono_spec.layers import infinityformer as infinityformer_layer
from unisono_spec.layers import lat as lat_layer
from unisono_spec.models import create
from unisono_spec.models.base import Model

T, RESET, UNREAD, CUT = 8, 4, 5, 6  # tokens; the reset's; the one that is not valid; where one call ends and the next begins
V, D = 7, 4
DEPARTURES = ("channel_weights", "learned_decay", "normalised", "skip")  # of CRAM's adaptive scheme
Past = dict[str, Any]  # what a sequence has left behind, by layer
Drop = Callable[[int], np.ndarray]  # the multiplier of each update


def logits(p: P, x: np.ndarray) -> np.ndarray:
    return linear(p, "head", norm(p, "norm", x))


def ffn(p: P, name: str, x: np.ndarray, f: Callable[[np.ndarray], np.ndarray] = gelu) -> np.ndarray:
    return linear(p, f"{name}.down", f(linear(p, f"{name}.up", x)))


def bits(n: int, width: int) -> np.ndarray:
    return np.array([float(bit) for bit in f"{n:0{width}b}"])


def cram_fixed(p: P, c: Any, token: int, t: int, past: Past, drop: Drop) -> np.ndarray:
    past["xi"] = c.decay * past.get("xi", 0.0) + (1 - c.decay) * sigma(bits(token, c.code_bits))
    x = linear(p, "input", past["xi"])
    for i in range(2):
        x = x + drop(i) * ffn(p, f"layers.{i}.ffn", norm(p, f"layers.{i}.norm", x), gelu_tanh)
    return logits(p, x)


def cram_adaptive(p: P, c: Any, token: int, t: int, past: Past, drop: Drop) -> np.ndarray:
    x = p["embedding.weight"][token]
    for i in range(2):
        layer = f"layers.{i}"
        u = norm(p, f"{layer}.input_norm", x)
        h = np.append(bits(t, c.position_bits), u @ p[f"{layer}.mixer.Q"] @ u / D**0.5)
        for part in range(2):
            h = gelu_tanh(linear(p, f"{layer}.mixer.score.{part}", h))
        s = linear(p, f"{layer}.mixer.score.2", h)
        if not c.normalised:
            past[layer] = past.get(layer, 0.0) + s * sigma(u)
            read = norm(p, f"{layer}.norm", past[layer])
        else:  # with all departures
            keep, w = sigma(p[f"{layer}.mixer.decay"]), np.log1p(np.exp(s))
            top, bottom = past.get(layer, (0.0, 0.0))
            past[layer] = top, bottom = keep * top + w * sigma(u), keep * bottom + w
            read = norm(p, f"{layer}.norm", top / (bottom + 1e-6)) + u
        x = x + drop(i) * ffn(p, f"{layer}.ffn", read, gelu_tanh)
    return logits(p, x)


def lat(p: P, c: Any, token: int, t: int, past: Past, drop: Drop) -> np.ndarray:
    x = p["embedding.weight"][token]
    for i, kind in enumerate(getattr(c, "kinds", ("softmax", "softmax"))):
        layer, h = f"layers.{i}", norm(p, f"layers.{i}.mixer_norm", x)
        read = past.setdefault(layer, [])
        if kind == "conv":
            a, b = np.split(linear(p, f"{layer}.mixer.input", h), 2)
            read.append(b)
            taps = p[f"{layer}.mixer.conv.weight"][:, 0]
            o = a * sigma(a) * (sum(taps[:, 2 - j] * read[-1 - j] for j in range(min(3, len(read)))) + p[f"{layer}.mixer.conv.bias"])
        else:
            q, k, v = np.split(linear(p, f"{layer}.mixer.qkv", h), 3)
            q, k = (rotated(a.reshape(2, 2), t) for a in (q, k))
            if kind == "linear":
                q, k = elu1(q), elu1(k)
            read.append((k, v.reshape(2, 2)))
            o = np.zeros((2, 2))
            for head in range(2):
                keys, values = (np.array([one[part][head] for one in (read[-3:] if kind == "window" else read)]) for part in (0, 1))
                w = keys @ q[head]
                o[head] = (w / (w.sum() + 1e-6) if kind == "linear" else softmax(w / 2**0.5)) @ values
        if f"{layer}.mixer.head_norm.weight" in p:
            o = norm(p, f"{layer}.mixer.head_norm", o)
        x = x + drop(2 * i) * linear(p, f"{layer}.mixer.out", o.reshape(-1))
        x = x + drop(2 * i + 1) * ffn(p, f"{layer}.ffn", norm(p, f"{layer}.ffn_norm", x))
    return logits(p, x)


def infinityformer(p: P, c: Any, token: int, t: int, past: Past, drop: Drop) -> np.ndarray:
    x = p["embedding.weight"][token]
    for i in range(2):
        layer, h = f"layers.{i}", norm(p, f"layers.{i}.mixer_norm", x)
        q, k, v = (a.reshape(2, 2) for a in np.split(linear(p, f"{layer}.mixer.qkv", h), 3))
        q, k = elu1(rotated(q, t)), elu1(rotated(k, t))
        rate = np.append(1.0, sigma(p[f"{layer}.mixer.decay.bias"]))
        S, z = past.get(layer, (np.zeros((3, 2, 2, 2)), np.zeros((3, 2, 2))))
        S, z = (rate * S.T).T + k[:, :, None] * v[:, None], (rate * z.T).T + k
        past[layer] = S, z
        read = np.einsum("hk,shkv->shv", q, S) / (np.einsum("hk,shk->sh", q, z) + 1e-6)[..., None]
        g, share = sigma(linear(p, f"{layer}.mixer.gate", h)), softmax(p[f"{layer}.mixer.mix"])
        o = g * read[0] + (1 - g) * (share[0] * read[1] + share[1] * read[2])
        x = x + drop(2 * i) * linear(p, f"{layer}.mixer.out", o.reshape(-1))
        a, b = np.split(linear(p, f"{layer}.ffn.up", norm(p, f"{layer}.ffn_norm", x)), 2)
        x = x + drop(2 * i + 1) * linear(p, f"{layer}.ffn.down", gelu(a * sigma(b)))
    return logits(p, x)


def mamba_block(p: P, name: str, h: np.ndarray, past: Past) -> np.ndarray:
    u, z = np.split(linear(p, f"{name}.in_proj", h), 2)
    read = past.setdefault(f"{name}.conv", [])
    read.append(u)
    taps = p[f"{name}.conv1d.weight"][:, 0]
    u = sum(taps[:, 3 - j] * read[-1 - j] for j in range(min(4, len(read)))) + p[f"{name}.conv1d.bias"]
    u = u * sigma(u)
    delta, B, C = np.split(linear(p, f"{name}.x_proj", u), [1, 3])
    dt = np.log1p(np.exp(linear(p, f"{name}.dt_proj", delta)))[:, None]
    state = np.exp(-dt * np.exp(p[f"{name}.A_log"])) * past.get(f"{name}.ssm", 0.0) + dt * B * u[:, None]
    past[f"{name}.ssm"] = state
    return linear(p, f"{name}.out_proj", (state @ C + p[f"{name}.D"] * u) * z * sigma(z))


def mamba(p: P, c: Any, token: int, t: int, past: Past, drop: Drop) -> np.ndarray:
    x = p["embedding.weight"][token]
    for i in range(2):
        x = x + drop(i) * mamba_block(p, f"layers.{i}.mixer", norm(p, f"layers.{i}.norm", x, c.norm_eps), past)
    return linear(p, "head", norm(p, "norm", x, c.norm_eps))


def maru(p: P, c: Any, token: int, t: int, past: Past, drop: Drop) -> np.ndarray:
    x = p["embedding.weight"][token]
    for i in range(2):
        layer, cell = f"layers.{i}", f"layers.{i}.cell"
        x = x + drop(2 * i) * mamba_block(p, f"{layer}.mamba", norm(p, f"{layer}.mamba_norm", x), past)
        y = linear(p, f"{layer}.project", norm(p, f"{layer}.cell_norm", x))
        h, M = past.get(cell, (np.zeros(D), p[f"{cell}.memory"]))
        both = np.append(y, h)
        rho = softmax(linear(p, f"{cell}.router.1", np.maximum(linear(p, f"{cell}.router.0", both), 0)))
        key = linear(p, f"{cell}.query", both)
        c = sum(rho[n] * softmax(M[n] @ key / 2**0.5) @ M[n] for n in range(2))
        (r, keep, new), hidden = np.split(linear(p, f"{cell}.input", np.append(y, c)), 3), p[f"{cell}.hidden.weight"]
        r, keep = sigma(r + hidden[:D] @ h), sigma(keep + hidden[D : 2 * D] @ h)
        h = keep * h + (1 - keep) * np.tanh(new + hidden[2 * D :] @ (r * h))
        key, v = linear(p, f"{cell}.key", h), linear(p, f"{cell}.value", h)
        w = [rho[n] * sigma(linear(p, f"{cell}.gate", h)) * softmax(M[n] @ key / 2**0.5) for n in range(2)]
        past[cell] = h, np.array([M[n] * (1 - np.outer(w[n], sigma(v))) + np.outer(w[n], np.tanh(v)) for n in range(2)])
        x = x + drop(2 * i + 1) * h
    return linear(p, "head.1", np.maximum(linear(p, "head.0", norm(p, "norm", x)), 0))


def s4d(p: P, c: Any, token: int, t: int, past: Past, drop: Drop) -> np.ndarray:
    x = p["embedding.weight"][token]
    for i in range(2):
        layer, u = f"layers.{i}", norm(p, f"layers.{i}.mixer_norm", x)
        A = -np.exp(p[f"{layer}.mixer.log_A_real"]) + 1j * p[f"{layer}.mixer.A_imag"]
        power = np.exp(np.exp(p[f"{layer}.mixer.log_dt"])[:, None] * A)
        past[layer] = power * past.get(layer, 0.0) + (power - 1) / A * u[:, None]
        y = 2 * (p[f"{layer}.mixer.C"] @ np.array([1, 1j]) * past[layer]).sum(-1).real + p[f"{layer}.mixer.D"] * u
        value, gate = np.split(linear(p, f"{layer}.mixer.out", gelu(y)), 2)
        x = x + drop(2 * i) * value * sigma(gate)
        x = x + drop(2 * i + 1) * ffn(p, f"{layer}.ffn", norm(p, f"{layer}.ffn_norm", x))
    return logits(p, x)


SMALL: dict[str, Any] = {"d_model": D, "n_layers": 2, "vocab_size": V}
HEADS: dict[str, Any] = {**SMALL, "head_width": 2, "ffn_mult": 1}
LAT: dict[str, Any] = {**HEADS, "qk_width": 2, "conv_mult": 2, "window": 3, "positions": "rope"}
WIRED: dict[str, tuple[Config, Callable[..., np.ndarray]]] = {
    "cram.fixed": (CRAMConfig(**SMALL, code_bits=3), cram_fixed),
    "cram.adaptive": (CRAMConfig(**SMALL, scheme="adaptive", position_bits=4, input_norm=True), cram_adaptive),
    "cram.plus": (
        CRAMConfig(**SMALL, scheme="adaptive", position_bits=4, **dict.fromkeys(("input_norm", *DEPARTURES), True)),
        cram_adaptive,
    ),
    "lat.linear": (LATConfig(**LAT), lat),
    "lat.head_norm": (LATConfig(**LAT, head_norm=True), lat),
    "lat.window": (LATConfig(**LAT, attention="window"), lat),
    "lat.conv": (LATConfig(**LAT, attention="conv"), lat),
    "lat.hybrid": (LATConfig(**LAT, attention=("softmax", "linear")), lat),
    "transformer": (TransformerConfig(**HEADS), lat),
    "infinityformer": (InfinityFormerConfig(**SMALL, n_heads=2, d_ffn=3, n_scales=2, rope="before", tie_head=False), infinityformer),
    "mamba": (MambaConfig(**SMALL, expand=2, d_state=2, tie_head=False, norm_eps=1e-3), mamba),
    "maru": (MARUConfig(**SMALL, prenorm=True, head_hidden=3, d_state=2, n_banks=2, n_slots=2, d_memory=2, router_hidden=3), maru),
    "s4d": (S4DConfig(**SMALL, d_state=4, ffn_mult=1), s4d),
}


def judge(name: str, change: Callable[[Config, P], Model] = create) -> None:
    """Both forms of `change(config, params)` against the formulas, in one call and in two."""
    (config, by_hand), rng = WIRED[name], np.random.default_rng(31)
    p = {n: a + 0.3 * rng.normal(size=a.shape) for n, a in init_params(config, dtype="float64").items()}
    tokens, masks = rng.integers(0, V, (1, T)), [rng.choice([0.0, 2.0], (1, T, D), p=[0.2, 0.8]) for _ in range(config.n_updates)]
    reset, valid = np.zeros((1, T), bool), np.ones((1, T), bool)
    reset[0, RESET], valid[0, UNREAD] = True, False
    want, past, position = {}, {}, 0
    for t in np.flatnonzero(valid[0]):
        past, position = ({}, 0) if reset[0, t] else (past, position)
        want[t] = by_hand(p, config, tokens[0, t], position, past, lambda update, t=t: masks[update][0, t])
        position += 1
    model = change(config, p)
    for form in ("parallel", "recurrent"):
        state = model.init_state(1, T)
        for calls in ([slice(0, T)], [slice(0, CUT), slice(CUT, T)]):
            after, out = state, []
            for part in calls:
                drawn = [m[:, part] for m in masks]
                y, after = model.forward(tokens[:, part], after, reset[:, part], valid[:, part], form, 3, drawn)
                out.append(y)
            checking.same(np.concatenate(out, 1)[0, list(want)], np.array(list(want.values())))


@pytest.mark.parametrize("name", WIRED)
def test_wiring(name: str) -> None:
    judge(name)


class _Miswired:
    """A model that hears its layers' parameters or states under each other's names."""

    def __init__(self, model: Model, swapped: dict[str, str]) -> None:
        self.model, self.swapped, self.init_state = model, swapped, model.init_state

    def forward(self, tokens: np.ndarray, state: P, *given: Any) -> Any:
        names = {name: _swap(name, self.swapped) for name in state}
        y, after = self.model.forward(tokens, {name: state[other] for name, other in names.items()}, *given)
        return y, after


def _swap(name: str, pair: dict[str, str]) -> str:
    for a, b in [*pair.items(), *((b, a) for a, b in pair.items())]:
        if a in name:
            return name.replace(a, b)
    return name


NORMS = {"cram": ("layers.0.norm", "layers.1.norm"), "mamba": ("layers.0.norm", "layers.1.norm"), "maru": ("mamba_norm", "cell_norm")}


@pytest.mark.parametrize("name", WIRED)
def test_swapped_norms_are_seen(name: str) -> None:
    a, b = NORMS.get(WIRED[name][0].arch, ("mixer_norm", "ffn_norm"))

    def swapped(config: Config, p: P) -> Model:
        return create(config, {n: p[_swap(n, {a: b})] for n in p})

    with pytest.raises(AssertionError):
        judge(name, swapped)


@pytest.mark.parametrize("name", [name for name in WIRED if name not in ("cram.fixed", "lat.hybrid")])  # whose layers keep no equal states
def test_states_of_another_layer_are_seen(name: str) -> None:
    with pytest.raises(AssertionError):
        judge(name, lambda config, p: _Miswired(create(config, p), {"layers.0": "layers.1"}))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("update", [0, -1])
@pytest.mark.parametrize("name", WIRED)
def test_a_residual_left_out_is_seen(name: str, update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    updated, count, updates = Model._updated, itertools.count(), WIRED[name][0].n_updates

    def left_out(model: Model, x: np.ndarray, *given: Any) -> np.ndarray:
        return updated(model, x * (next(count) % updates != update % updates), *given)

    monkeypatch.setattr(Model, "_updated", left_out)
    with pytest.raises(AssertionError):
        judge(name)


HALVES = {  # heads of four pairs, which power at rates of their own: of one pair, no base is seen
    "lat": LATConfig(d_model=16, n_layers=1, vocab_size=V, head_width=8, qk_width=8, positions="rope", ffn_mult=1),
    "transformer": TransformerConfig(d_model=16, n_layers=1, vocab_size=V, head_width=8, ffn_mult=1),
    "infinityformer": InfinityFormerConfig(d_model=16, n_layers=1, n_heads=2, d_ffn=4, vocab_size=V),
}


@pytest.mark.parametrize("name", HALVES)
def test_positions_turn_by_the_base_10000(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, params = np.arange(40)[None] % V, init_params(HALVES[name], dtype="float64")
    params = {n: a + np.random.default_rng(7).normal(size=a.shape) for n, a in params.items()}
    found = create(HALVES[name], params).forward(tokens)[0]
    for layer in (lat_layer, infinityformer_layer):
        monkeypatch.setattr(layer, "rotate", lambda x, position, base: rotated(x, position))
    checking.same(found, create(HALVES[name], params).forward(tokens)[0])
