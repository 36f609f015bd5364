"""CRAM: both schemes written out in loops, their forms, derivatives, and the facts that docs/architectures/cram.md states."""

from __future__ import annotations

import math
from typing import Any

import checking
import numpy as np
import pytest
from unisono_spec.contract import count_params, init_params, preset
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.errors import InputError
from unisono_spec.models import create
from unisono_spec.ops import decayed_sum, position, weighted_sum

SMALL: dict[str, Any] = {"d_model": 4, "n_layers": 2, "ffn_mult": 2, "vocab_size": 9}
CONFIGS = {
    "binary": CRAMConfig(**SMALL, code_bits=5),
    "frame": CRAMConfig(d_model=4, n_layers=1, codes="frame", frame_size=3, frame_head="gaussian"),
    "embedding": CRAMConfig(**SMALL, codes="embedding", tie_head=True, head_bias=True, decay=0.8),
    "adaptive": CRAMConfig(**SMALL, scheme="adaptive", position_bits=2, tie_head=True),
    "after": CRAMConfig(**SMALL, scheme="adaptive", position_bits=4, residual="after", input_norm=True, k_scale=1.0),
    "exclusive": CRAMConfig(**{**SMALL, "n_layers": 1}, scheme="adaptive", position_bits=3, exclusive=True),
    "channels": CRAMConfig(**SMALL, scheme="adaptive", position_bits=2, channel_weights=True),
    "decayed": CRAMConfig(**SMALL, scheme="adaptive", position_bits=2, learned_decay=True),
    "normalised": CRAMConfig(**SMALL, scheme="adaptive", position_bits=2, normalised=True, residual="after"),
    "skip": CRAMConfig(**SMALL, scheme="adaptive", position_bits=2, skip=True),
    "plus": CRAMConfig(
        **SMALL, scheme="adaptive", position_bits=2, input_norm=True, channel_weights=True, learned_decay=True, normalised=True, skip=True
    ),
}


def params_of(config: CRAMConfig) -> dict[str, np.ndarray]:
    """Initial values, moved: zero biases and unit scales hide a forgotten one."""
    rng = np.random.default_rng(1)
    return {name: p + 0.1 * rng.normal(size=p.shape) for name, p in init_params(config, dtype="float64").items()}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: list[float], weight: np.ndarray, bias: np.ndarray) -> list[float]:
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    return [(v - mean) / spread * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def linear(x: list[float], weight: np.ndarray, bias: np.ndarray | None = None) -> list[float]:
    bias = np.zeros(len(weight)) if bias is None else bias
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def ffn(p: dict[str, np.ndarray], name: str, x: list[float]) -> list[float]:
    hidden = [gelu(v) for v in linear(x, p[f"{name}.up.weight"], p[f"{name}.up.bias"])]
    return linear(hidden, p[f"{name}.down.weight"], p[f"{name}.down.bias"])


def test_fixed_scheme_written_out() -> None:
    """Eqs 2–6 for one sequence, by scalars: ξ_t = Σ_m 2^−(t−m+1) σ(x_m)."""
    config, tokens = CONFIGS["binary"], [3, 7, 1, 8, 0]
    p, logits = params_of(config), []
    for t in range(len(tokens)):
        digits = [[(token >> (4 - i)) & 1 for i in range(5)] for token in tokens[: t + 1]]
        xi = [sum(2.0 ** -(t - m + 1) * sigmoid(digits[m][i]) for m in range(t + 1)) for i in range(5)]
        x = linear(xi, p["input.weight"], p["input.bias"])
        for i in range(2):
            update = ffn(p, f"layers.{i}.ffn", norm(x, p[f"layers.{i}.norm.weight"], p[f"layers.{i}.norm.bias"]))
            x = [a + b for a, b in zip(x, update, strict=True)]
        logits.append(linear(norm(x, p["norm.weight"], p["norm.bias"]), p["head.weight"]))
    checking.same(create(config, p).forward(np.array([tokens]))[0], np.array([logits]))


@pytest.mark.parametrize("name", ["adaptive", "after", "exclusive", "channels", "decayed", "normalised", "skip", "plus"])
def test_adaptive_scheme_written_out(name: str) -> None:
    """Eqs 7–10 for one sequence, by scalars, with the weights of the source's index, and the departures as sums over all tokens so far."""
    config, tokens = CONFIGS[name], [3, 7, 1, 8, 0, 2]
    p, d = params_of(config), 4
    xs = [list(p["embedding.weight"][t]) for t in tokens]
    for i in range(config.n_layers):
        layer, terms, out, inputs, scores = f"layers.{i}", [], [], [], []
        rates = [1 / (1 + math.exp(-a)) for a in p[f"{layer}.mixer.decay"]] if config.learned_decay else [1.0] * d
        for t, x in enumerate(xs):
            u = norm(x, p[f"{layer}.input_norm.weight"], p[f"{layer}.input_norm.bias"]) if config.input_norm else x
            k = sum(u[a] * p[f"{layer}.mixer.Q"][a, b] * u[b] for a in range(d) for b in range(d)) / (config.k_scale or math.sqrt(d))
            h = [float(bit) for bit in f"{t % 2**config.position_bits:0{config.position_bits}b}"] + [k]
            for part in range(3):
                score = f"{layer}.mixer.score.{part}"
                h = linear(h, p[f"{score}.weight"], p[f"{score}.bias"])
                h = h if part == 2 else [gelu(v) for v in h]
            w = [math.log1p(math.exp(v)) if config.normalised else v for v in (h if config.channel_weights else h * d)]
            gained = config.learned_decay and not config.normalised
            scores.append([v * (1 - rate if gained else 1) for v, rate in zip(w, rates, strict=True)])
            terms.append([s * sigmoid(v) for s, v in zip(scores[-1], u, strict=True)])
            inputs.append(u)
        for t, x in enumerate(xs):
            until = t if config.exclusive else t + 1
            xi, z = ([math.fsum(rates[j] ** (t - m) * a[m][j] for m in range(until)) for j in range(d)] for a in (terms, scores))
            xi = [a / (b + 1e-6) for a, b in zip(xi, z, strict=True)] if config.normalised else xi
            weights = p[f"{layer}.norm.weight"], p[f"{layer}.norm.bias"]
            if config.residual == "after":
                out.append(norm([a + b for a, b in zip(xi, ffn(p, f"{layer}.ffn", xi), strict=True)], *weights))
            else:
                read = [a + b * config.skip for a, b in zip(norm(xi, *weights), inputs[t], strict=True)]
                out.append([a + b for a, b in zip(x, ffn(p, f"{layer}.ffn", read), strict=True)])
        xs = out
    head = p["embedding.weight" if config.tie_head else "head.weight"]
    logits = [linear(norm(x, p["norm.weight"], p["norm.bias"]), head) for x in xs]
    checking.same(create(config, p).forward(np.array([tokens]))[0], np.array([logits]))


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.001])
def test_decayed_sum_forms(decay: float) -> None:
    rng = np.random.default_rng(2)
    x, state = 3 * rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 3))
    checking.op_forms(
        lambda x, s, r, v: decayed_sum.recurrent(x, decay, s, r, v),
        lambda x, s, r, v, chunk_size=3: decayed_sum.parallel(x, decay, s, r, v, chunk_size),
        [x], state, rng,
    )  # fmt: skip


@pytest.mark.parametrize("exclusive", [False, True])
def test_weighted_sum_forms(exclusive: bool) -> None:
    rng = np.random.default_rng(3)
    inputs, state = [3 * rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 9))], rng.normal(size=(2, 3))
    checking.op_forms(
        lambda x, s, state, r, v: weighted_sum.recurrent(x, s, state, r, v, exclusive),
        lambda x, s, state, r, v, chunk_size=3: weighted_sum.parallel(x, s, state, r, v, exclusive, chunk_size),
        inputs, state, rng,
    )  # fmt: skip


def test_position_forms() -> None:
    rng = np.random.default_rng(4)
    reset, valid = checking.marks(rng, 3, 12)
    state, out = np.array([0, 5, 1000], np.int32), []
    first = state
    for t in range(12):
        where, state = position.step(state, reset[:, t], valid[:, t])
        out.append(where)
    found, last = position.parallel(first, 12, reset, valid)
    assert np.array_equal(found, np.stack(out, 1))
    assert np.array_equal(last, state)
    assert found.dtype == last.dtype == np.int32


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "frame"])
def test_model(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(5)
    tokens = rng.integers(0, 9, (2, 8))
    model = create(config, params_of(config))
    checking.model_forms(model, tokens, rng)
    checking.model_marks(model, tokens)
    # wider, since a norm over four numbers that happen to be alike has third derivatives that no finite difference can follow
    wide = config.replace(d_model=16)
    if not config.exclusive:  # whose first ξ is 0, where LayerNorm is as steep as 1/√ε
        checking.model_derivative(lambda p: create(wide, p), params_of(wide), tokens[:, :5], rng)


def test_dropout_multiplies_updates() -> None:
    config = CONFIGS["adaptive"]
    p, tokens = params_of(config), np.array([[1, 2, 3, 4]])
    nothing = [np.zeros((1, 4, 4))] * 2
    cut = {n: np.zeros_like(a) if ".down." in n else a for n, a in p.items()}
    for form in ("recurrent", "parallel"):
        checking.same(create(config, p).forward(tokens, form=form, dropout=nothing)[0], create(config, cut).forward(tokens, form=form)[0])


def test_preset_counts() -> None:
    """1,060,212, and 141.18 M of which the blocks are 63.98 M: the paper's "12×768 ≈ 1M" cannot be."""
    assert count_params(preset("cram-1m")) == 1_060_212
    assert count_params(preset("cram-paper")) == 141_179_316
    blocks = sum(math.prod(p.shape) for n, p in preset("cram-paper").params().items() if n.startswith("layers."))
    assert round(blocks / 1e6, 2) == 63.98


def bits(config: CRAMConfig, tokens: np.ndarray, dtype: str) -> np.ndarray:
    return create(config, dtype=dtype).forward(tokens)[1]["xi"]


def test_xi_lies_between_0_and_1() -> None:
    x = np.random.default_rng(6).normal(scale=10, size=(1, 4000, 8))
    xi, _ = decayed_sum.parallel(x, 0.5, np.zeros((1, 8)))
    assert 0 < xi.min() < xi.max() < 1


def test_binary_sequence_decodes_from_xi() -> None:
    """ξ = Σ 2^−(n+1) σ(b) is affine in the binary fraction 0.b…b, whose digits can be read off, within the reach of float64."""
    digits = np.random.default_rng(7).integers(0, 2, 45)
    _, xi = decayed_sum.recurrent(digits[None, :, None].astype(float), 0.5, np.zeros((1, 1)))
    low, high, n = sigmoid(0), sigmoid(1), len(digits)
    fraction = (float(xi[0, 0]) - low * (1 - 2.0**-n)) / (high - low)  # Σ 2^−(n+1) b
    number = round(fraction * 2**n)
    assert [int(c) for c in f"{number:0{n}b}"] == digits[::-1].tolist()


@pytest.mark.parametrize(("dtype", "reach"), [("float32", 21), ("float64", 50)])
def test_reach_of_one_bit(dtype: str, reach: int) -> None:
    """How far back every input bit still changes ξ: 21 tokens in float32 through σ, 50 in float64, up to two of rounding.

    Beyond that a bit changes ξ only where roundings happen to carry it on.
    """
    length = 70
    tokens = np.random.default_rng(8).integers(0, 2, (1, length))
    config = CRAMConfig(d_model=4, n_layers=0, vocab_size=2, code_bits=1)
    rows = np.repeat(tokens, length, 0)
    rows[np.arange(length), np.arange(length)] ^= 1  # row j differs in token j
    changed = (bits(config, rows, dtype) != bits(config, tokens, dtype)).any(-1)
    back = length - 1 - np.flatnonzero(~changed).max()
    assert abs(back - reach) <= 2


def test_raw_bits_reach_25_in_float32() -> None:
    """Without σ a digit's 0 and 1 lie 1 apart instead of 0.23."""
    length = 40
    rows = np.repeat(np.random.default_rng(8).integers(0, 2, (1, length)), length + 1, 0)
    rows[:, -1] = 1  # ξ in [½, 1)
    rows[np.arange(length - 1), np.arange(length - 1)] ^= 1
    xi = np.zeros(length + 1, np.float32)
    for t in range(length):
        xi = np.float32(0.5) * (xi + rows[:, t].astype(np.float32))
    back = length - np.flatnonzero(xi[:-2] != xi[-1]).min()
    assert abs(back - 25) <= 1


def test_naive_powers_overflow_and_the_chunks_do_not() -> None:
    """2^−t·cumsum(2^t σ) is not finite from t = 128 in float32."""
    u = np.full(200, 0.5, np.float32)
    t = np.arange(200, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        naive = np.cumsum(np.float32(2) ** t * u) / np.float32(2) ** t
    assert np.flatnonzero(~np.isfinite(naive))[0] == 128
    xi, _ = decayed_sum.parallel(np.zeros((1, 200, 1), np.float32), 0.5, np.zeros((1, 1), np.float32))
    assert np.isfinite(xi).all()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"decay": 1.0}, "decay"),
        ({"dropout": 1.0}, "dropout"),
        ({"code_bits": 3}, "code_bits"),
        ({"k_scale": 2.0}, "k_scale"),
        ({"tie_head": True}, "tie_head"),
        ({"frame_size": 4}, "frame_size"),
        ({"scheme": "adaptive", "decay": 0.9}, "decay"),
        ({"scheme": "adaptive", "exclusive": True}, "exclusive"),
        ({"scheme": "adaptive", "position_bits": 31}, "position_bits"),
        ({"scheme": "adapted"}, "adaptive"),
        ({"d_model": 4.0}, "d_model"),
        ({"n_layers": True}, "n_layers"),
        ({"deacy": 0.5}, "'decay'"),
    ],
)
def test_config_errors_name_the_field(changes: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        CRAMConfig.from_dict({**SMALL, **changes})
