"""One layer of each model written out in plain formulas, token by token over the whole past: neither form's code is used."""

from __future__ import annotations

import checking
import numpy as np
import pytest
from formulas import P, elu1, gelu, linear, norm, rotated, sigma
from unisono_conformance import numerics
from unisono_spec.contract import Config, init_params
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.contract.s4d import S4DConfig
from unisono_spec.models import create

T, V = 5, 7


def setup(config: Config) -> tuple[P, np.ndarray, np.ndarray]:
    """Parameters, tokens [T], and the logits [T, V] that the spec gives."""
    rng = np.random.default_rng(29)
    p = {n: a + 0.3 * rng.normal(size=a.shape) for n, a in init_params(config, dtype="float64").items()}
    tokens = rng.integers(0, V, (1, T))
    return p, tokens[0], create(config, p).forward(tokens)[0][0]


def rotate(x: np.ndarray) -> np.ndarray:
    """RoPE of [T, H, K]."""
    return rotated(x, np.arange(T))


def test_lat() -> None:
    config = LATConfig(d_model=8, n_layers=1, vocab_size=V, head_width=4, qk_width=2, feature_map="learned", positions="rope")
    p, tokens, logits = setup(config)
    x = p["embedding.weight"][tokens]
    y = linear(p, "layers.0.mixer.qkv", norm(p, "layers.0.mixer_norm", x))
    q, k, v = (a.reshape(T, 2, -1) for a in (y[:, :4], y[:, 4:8], y[:, 8:]))
    q, k = (elu1(p["layers.0.mixer.tau"] * rotate(a)) for a in (q, k))
    o = np.zeros((T, 2, 4))
    for t in range(T):
        for h in range(2):
            weight = [q[t, h] @ k[j, h] for j in range(t + 1)]
            o[t, h] = sum(w * v[j, h] for j, w in enumerate(weight)) / (sum(weight) + 1e-6)
    x = x + linear(p, "layers.0.mixer.out", o.reshape(T, 8))
    x = x + linear(p, "layers.0.ffn.down", gelu(linear(p, "layers.0.ffn.up", norm(p, "layers.0.ffn_norm", x))))
    checking.same(logits, linear(p, "head", norm(p, "norm", x)))


def test_based_convolution() -> None:
    config = LATConfig(
        d_model=6, n_layers=1, vocab_size=V, head_width=3, attention="conv", norm="rms", ffn="swiglu", ffn_mult=2, bias=False, tie_head=True
    )
    p, tokens, logits = setup(config.replace(head_bias=False))
    x = p["embedding.weight"][tokens]
    a, b = np.split(linear(p, "layers.0.mixer.input", norm(p, "layers.0.mixer_norm", x)), 2, -1)
    y = np.zeros_like(b)
    for t in range(T):
        for back in range(min(3, t + 1)):
            y[t] += p["layers.0.mixer.conv.weight"][:, 0, 2 - back] * b[t - back]
    x = x + linear(p, "layers.0.mixer.out", a * sigma(a) * y)
    h = norm(p, "layers.0.ffn_norm", x)
    gate = linear(p, "layers.0.ffn.gate", h)
    x = x + linear(p, "layers.0.ffn.down", gate * sigma(gate) * linear(p, "layers.0.ffn.up", h))
    checking.same(logits, norm(p, "norm", x) @ p["embedding.weight"].T)


@pytest.mark.parametrize("rope", ["before", "numerator", "none"])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("decay", ["learned", "data"])
def test_infinityformer(rope: str, gate: str, decay: str) -> None:
    config = InfinityFormerConfig(d_model=8, n_layers=1, n_heads=2, d_ffn=6, vocab_size=V, n_scales=2)
    p, tokens, logits = setup(config.replace(rope=rope, gate=gate, decay=decay))
    x = p["embedding.weight"][tokens]
    h = norm(p, "layers.0.mixer_norm", x)
    q, k, v = (a.reshape(T, 2, 4) for a in np.split(linear(p, "layers.0.mixer.qkv", h), 3, -1))
    if rope == "before":
        q, k = rotate(q), rotate(k)
    q, k = elu1(q), elu1(k)
    top_q, top_k = (rotate(q), rotate(k)) if rope == "numerator" else (q, k)
    own = linear(p, "layers.0.mixer.decay", h) if decay == "data" else np.tile(p["layers.0.mixer.decay.bias"], (T, 1))
    rate = np.concatenate([np.ones((T, 1)), sigma(own)], -1)  # λ [T, 3]
    share = np.exp(p["layers.0.mixer.mix"])
    share = share / share.sum()
    o = np.zeros((T, 2, 4))
    for t in range(T):
        g = np.broadcast_to(sigma(linear(p, "layers.0.mixer.gate", h[t])), 8).reshape(2, 4)
        for head in range(2):
            read = []
            for s in range(3):
                kept = [np.prod(rate[j + 1 : t + 1, s]) for j in range(t + 1)]
                top = sum(kept[j] * (top_q[t, head] @ top_k[j, head]) * v[j, head] for j in range(t + 1))
                read.append(top / (sum(kept[j] * (q[t, head] @ k[j, head]) for j in range(t + 1)) + 1e-6))
            o[t, head] = g[head] * read[0] + (1 - g[head]) * (share[0] * read[1] + share[1] * read[2])
    x = x + linear(p, "layers.0.mixer.out", o.reshape(T, 8))
    a, b = np.split(linear(p, "layers.0.ffn.up", norm(p, "layers.0.ffn_norm", x)), 2, -1)
    x = x + linear(p, "layers.0.ffn.down", gelu(a * sigma(b)))
    checking.same(logits, norm(p, "norm", x) @ p["embedding.weight"].T)


@pytest.mark.parametrize("prenorm", [True, False])
def test_maru(prenorm: bool) -> None:
    """With memories that begin at zero and a write gate that is shut, c = 0 and the cell is a GRU."""
    config = MARUConfig(d_model=4, vocab_size=V, head_hidden=3, d_state=2, dt_rank=2, n_banks=2, n_slots=2, d_memory=2, prenorm=prenorm)
    p, tokens, _ = setup(config)
    p["layers.0.cell.memory"] = 0 * p["layers.0.cell.memory"]
    p["layers.0.cell.gate.bias"] = np.full(1, -1e4)
    logits = create(config, p).forward(tokens[None])[0][0]
    m, c, D = "layers.0.mamba", "layers.0.cell", 8
    x = p["embedding.weight"][tokens]
    uz = linear(p, f"{m}.in_proj", norm(p, f"{m}_norm", x) if prenorm else x)
    raw, z, u, y, state = uz[:, :D], uz[:, D:], np.zeros((T, D)), np.zeros((T, D)), np.zeros((D, 2))
    for t in range(T):
        taps = sum(p[f"{m}.conv1d.weight"][:, 0, 3 - back] * raw[t - back] for back in range(min(4, t + 1))) + p[f"{m}.conv1d.bias"]
        u[t] = taps * sigma(taps)
        delta, B, C = np.split(linear(p, f"{m}.x_proj", u[t]), [2, 4])
        dt = np.log1p(np.exp(linear(p, f"{m}.dt_proj", delta)))
        for d in range(D):
            for n in range(2):
                state[d, n] = np.exp(-dt[d] * np.exp(p[f"{m}.A_log"][d, n])) * state[d, n] + dt[d] * B[n] * u[t, d]
            y[t, d] = C @ state[d] + p[f"{m}.D"][d] * u[t, d]
    update = linear(p, f"{m}.out_proj", y * z * sigma(z))
    x = x + update if prenorm else update
    xs = linear(p, "layers.0.project", norm(p, "layers.0.cell_norm", x) if prenorm else x)
    h, out = np.zeros(4), np.zeros((T, 4))
    W, U, b = p[f"{c}.input.weight"][:, :4], p[f"{c}.hidden.weight"], p[f"{c}.input.bias"]
    for t in range(T):
        r, keep = sigma(W[:4] @ xs[t] + U[:4] @ h + b[:4]), sigma(W[4:8] @ xs[t] + U[4:8] @ h + b[4:8])
        h = keep * h + (1 - keep) * np.tanh(W[8:] @ xs[t] + U[8:] @ (r * h) + b[8:])
        out[t] = h
    x = norm(p, "norm", x + out) if prenorm else out
    checking.same(logits, linear(p, "head.1", np.maximum(linear(p, "head.0", x), 0)))


def test_s4d() -> None:
    p, tokens, logits = setup(S4DConfig(d_model=3, n_layers=1, vocab_size=V, d_state=4, ffn_mult=0))
    x = p["embedding.weight"][tokens]
    u = norm(p, "layers.0.mixer_norm", x)
    A = -np.exp(p["layers.0.mixer.log_A_real"]) + 1j * p["layers.0.mixer.A_imag"]
    C = p["layers.0.mixer.C"] @ np.array([1, 1j])
    power = np.exp(np.exp(p["layers.0.mixer.log_dt"])[:, None] * A)
    y = np.zeros((T, 3))
    for t in range(T):
        past = sum(power ** (t - j) * (power - 1) / A * u[j][:, None] for j in range(t + 1))
        y[t] = 2 * (C * past).sum(-1).real + p["layers.0.mixer.D"] * u[t]
    value, gate = np.split(linear(p, "layers.0.mixer.out", gelu(y)), 2, -1)
    checking.same(logits, linear(p, "head", norm(p, "norm", x + value * sigma(gate))))


def test_residual_branches_start_small() -> None:
    """Std 0.02 for a Linear, 0.02 / √(2 · layers) for the last one of a branch."""
    configs = (LATConfig(n_layers=2, vocab_size=V), InfinityFormerConfig(d_model=128, n_heads=2, d_ffn=256, n_layers=2, vocab_size=V))
    for config in configs:
        p = init_params(config, dtype="float64")
        for name, std in (("mixer.qkv", 0.02), ("ffn.up", 0.02), ("mixer.out", 0.01), ("ffn.down", 0.01)):
            weight = p[f"layers.1.{name}.weight"]
            assert abs(weight.std() / std - 1) < numerics.sampling(2 * weight.size), name
            assert not p[f"layers.1.{name}.bias"].any()
