"""The spec against implementations that no one here wrote: `python -m nox -s oracles`. Differences are relative to the largest value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import torch
from torch.nn import functional as F
from unisono_spec.contract import init_params
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.models import create
from unisono_spec.ops import (
    decayed_sum,
    diagonal_ssm,
    features,
    linear_attention,
    mom_gru,
    multiscale,
    rotary,
    short_conv,
    softmax_attention,
    window,
)

B, T, H, K, V = 2, 64, 3, 8, 16


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def qkv(random) -> tuple[np.ndarray, ...]:
    return tuple(random.normal(size=(B, T, H, width)) for width in (K, K, V))


def _tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(a) for a in arrays]


def test_linear_attention(agree, qkv):
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn, naive_recurrent_linear_attn

    q, k, v = qkv
    q, k = features.elu1(q), features.elu1(k)
    o, (S, z) = linear_attention.parallel(q, k, v, (np.zeros((B, H, K, V)), np.zeros((B, H, K))))
    given = _tensors(q, k, v)
    theirs, (kv, k_sum) = naive_recurrent_linear_attn(*given, scale=1.0, output_final_state=True, normalize=True)
    oracle = "fla.ops.linear_attn.naive"
    agree("LAT, elu1", f"{oracle}, recurrent", o, theirs, "float32", T)
    agree("LAT, final S", f"{oracle}, recurrent", S, kv, "float32", T)
    agree("LAT, final z", f"{oracle}, recurrent", z, np.asarray(k_sum).reshape(z.shape), "float32", T)
    chunked = naive_chunk_linear_attn(*(a.float() for a in given), scale=1.0, normalize=True)
    agree("LAT, elu1", f"{oracle}, chunk", o, chunked, "float32", T)


def test_elu1(agree, random):
    x = 8 * random.normal(size=100)
    agree("elu1", "torch.nn.functional.elu", features.elu1(x), F.elu(torch.tensor(x)) + 1, "float64", 1)


def test_taylor(agree, qkv):
    from fla.ops.based.naive import naive_parallel_based

    q, k, v = qkv
    width = 1 + K + K * K
    o, _ = linear_attention.parallel(features.taylor2(q), features.taylor2(k), v, (np.zeros((B, H, width, V)), np.zeros((B, H, width))))
    theirs = naive_parallel_based(*(a.transpose(1, 2) for a in _tensors(q, k, v))).transpose(1, 2)
    agree("Based, taylor2", "fla.ops.based.naive, parallel", o, theirs, "float64", T)


def test_decayed_memory(agree, qkv):
    """One scale of InfinityFormer is gated linear attention with a column of ones in v, which is its normaliser."""
    from fla.ops.gla.naive import naive_recurrent_gla

    q, k, v = qkv
    q, k = features.elu1(q), features.elu1(k)
    log_decay = np.full((B, T, 1), math.log(0.99))
    zero = np.zeros((B, 1, H, K, V)), np.zeros((B, 1, H, K))
    o, (S, z) = multiscale.parallel(q, k, v, q, k, log_decay, np.ones((B, T, 1, 1, 1)), zero)
    ones = np.concatenate([v, np.ones((B, T, H, 1))], -1)
    gates = np.broadcast_to(log_decay[..., None], k.shape).copy()
    read, state = naive_recurrent_gla(*_tensors(q * math.sqrt(K), k, ones, gates), output_final_state=True)
    oracle = "fla.ops.gla.naive, recurrent"
    agree("InfinityFormer, one scale", oracle, o, read[..., :-1] / (read[..., -1:] + multiscale.EPS), "float32", T)
    agree("InfinityFormer, final S", oracle, S[:, 0], state[..., :-1], "float32", T)
    agree("InfinityFormer, final z", oracle, z[:, 0], state[..., -1], "float32", T)


def test_onnx_linear_attention(agree, qkv):
    from onnx.reference.ops.op_linear_attention import LinearAttention

    q, k, v = (a.astype(np.float32) for a in qkv)
    q, k = features.elu1(q), features.elu1(k)
    v1 = np.concatenate([v, np.ones((B, T, H, 1), np.float32)], -1)
    o, (S, _) = linear_attention.recurrent(*(a.astype(np.float64) for a in (q, k, v)), (np.zeros((B, H, K, V)), np.zeros((B, H, K))))
    packed = [a.reshape(B, T, -1) for a in (q, k, v1)]
    node = {"q_num_heads": H, "kv_num_heads": H, "update_rule": "linear", "scale": 1.0}
    read, state = LinearAttention.eval(*packed, **node)
    read = read.reshape(B, T, H, V + 1)
    theirs = read[..., :-1] / (read[..., -1:] + linear_attention.EPS)
    agree("LAT, elu1", "onnx.reference LinearAttention", o, theirs, "float32", T)
    agree("LAT, final S", "onnx.reference LinearAttention", S, state[..., :-1], "float32", T)


def test_softmax_attention(agree, qkv):
    q, k, v = qkv
    v = v[..., :K]
    cache = np.zeros((B, T, H, K)), np.zeros((B, T, H, K)), np.zeros(B, np.int32)
    o, _ = softmax_attention.parallel(q, k, v, cache)
    heads = [a.transpose(1, 2) for a in _tensors(q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    agree("Transformer, softmax attention", "torch scaled_dot_product_attention", o, theirs, "float64", T)
    width = 9
    o, _ = window.parallel(q, k, v, (np.zeros((B, width, H, K)), np.zeros((B, width, H, K)), np.zeros(B, np.int32)))
    near = torch.ones(T, T).tril().triu(1 - width).bool()
    theirs = F.scaled_dot_product_attention(*heads, attn_mask=near).transpose(1, 2)
    agree("LAT, sliding window", "torch scaled_dot_product_attention", o, theirs, "float64", T)


def test_rotary(agree, qkv):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    position = np.arange(T)
    angles = np.outer(position, 10000.0 ** (-np.arange(0, K, 2) / K))
    cos, sin = _tensors(*(np.concatenate([f(angles)] * 2, -1)[None] for f in (np.cos, np.sin)))
    q = torch.tensor(qkv[0]).transpose(1, 2)
    theirs, _ = apply_rotary_pos_emb(q, q, cos, sin)
    ours = rotary.rotate(qkv[0], np.broadcast_to(position, (B, T)))
    agree("RoPE", "transformers Llama", ours, theirs.transpose(1, 2), "float64", T)


def test_short_convolution(agree, random):
    x, weight, bias = random.normal(size=(B, T, 5)), random.normal(size=(5, 1, 4)), random.normal(size=5)
    ours, _ = short_conv.parallel(x, weight, bias, np.zeros((B, 3, 5)))
    tensor = F.pad(torch.tensor(x).transpose(1, 2), (3, 0))
    theirs = F.conv1d(tensor, torch.tensor(weight), torch.tensor(bias), groups=5).transpose(1, 2)
    agree("short convolution", "torch conv1d", ours, theirs, "float64", 4)


def test_mamba(agree, random):
    from transformers import MambaConfig as Theirs
    from transformers import MambaForCausalLM

    config = MambaConfig(d_model=16, n_layers=2, vocab_size=29, d_state=5, dt_rank=3)
    params = {name: p + 0.2 * random.normal(size=p.shape) for name, p in init_params(config, 0, "float64").items()}
    model = MambaForCausalLM(
        Theirs(
            vocab_size=29, hidden_size=16, state_size=5, num_hidden_layers=2, time_step_rank=3, expand=2, conv_kernel=4,
            layer_norm_epsilon=1e-6, tie_word_embeddings=True, residual_in_fp32=False,
        )
    ).double()  # fmt: skip

    def renamed(name: str) -> str:
        if name.startswith("norm."):
            return f"backbone.norm_f.{name[5:]}"
        return f"backbone.{name.replace('embedding.', 'embeddings.')}"

    missing = model.load_state_dict({renamed(name): torch.tensor(p) for name, p in params.items()}, strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # tied
    tokens = random.integers(0, 29, (B, T))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits
    logits, _ = create(config, params).forward(tokens)
    # the slow path keeps its scan in float32
    agree("Mamba, logits of two layers", "transformers Mamba, slow path", logits, theirs, "float32", T)


def test_gru(agree, random):
    """Without memory (M₀ = 0 and the write gate shut) the cell is a GRU; torch resets after the product, so U_h must be diagonal."""
    d, m = 6, 4
    hidden = random.normal(size=(3 * d, d))
    hidden[2 * d :] = np.diag(random.normal(size=d))
    weight, bias = random.normal(size=(3 * d, d + m)), random.normal(size=3 * d)
    p = {"memory": np.zeros((2, 3, m)), "input.weight": weight, "input.bias": bias, "hidden.weight": hidden}
    shapes = {"router.0": (5, 2 * d), "router.1": (2, 5), "query": (m, 2 * d), "key": (m, d), "value": (m, d), "gate": (1, d)}
    for name, (out, into) in shapes.items():
        p |= {f"{name}.weight": random.normal(size=(out, into)), f"{name}.bias": random.normal(size=out)}
    p["gate.weight"], p["gate.bias"] = np.zeros((1, d)), np.full(1, -1e4)
    x = random.normal(size=(B, T, d))
    h, _ = mom_gru.recurrent(x, p, (np.zeros((B, d)), np.zeros((B, 2, 3, m))))
    cell = torch.nn.GRUCell(d, d, dtype=torch.float64)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor(weight[:, :d]))
        cell.weight_hh.copy_(torch.tensor(hidden))
        cell.bias_ih.copy_(torch.tensor(bias))
        cell.bias_hh.zero_()
        state, out = torch.zeros(B, d, dtype=torch.float64), []
        for t in range(T):
            state = cell(torch.tensor(x[:, t]), state)
            out.append(state)
    agree("MoM-GRU without memory", "torch.nn.GRUCell", h, torch.stack(out, 1), "float64", T)


def test_s4d(agree, random):
    """One channel is a continuous system of 2 P real states, sampled with a zero-order hold."""
    pairs, dt, D = 3, 0.05, 0.7
    A = np.stack([-random.uniform(0.2, 1, (1, pairs)), math.pi * np.arange(pairs)[None]], -1)
    C = random.normal(size=(1, pairs, 2))
    u = random.normal(size=(1, T, 1))
    ours, _ = diagonal_ssm.parallel(u, np.array([dt]), A, C, np.array([D]), np.zeros((1, 1, pairs, 2)))
    blocks = scipy.linalg.block_diag(*([[re, -im], [im, re]] for re, im in A[0]))
    into = np.tile([[1.0], [0.0]], (pairs, 1))
    out = 2 * np.stack([C[0, :, 0], -C[0, :, 1]], -1).reshape(1, -1)
    discrete = scipy.signal.cont2discrete((blocks, into, out, np.array([[D]])), dt, "zoh")
    # dlsim reads the state before it is updated, S4D after: the output is that of A_d h + B_d u
    Ad, Bd = discrete[0], discrete[1]
    _, theirs, _ = scipy.signal.dlsim((Ad, Bd, out @ Ad, out @ Bd + D, dt), u[0])
    agree("S4D, one channel", "scipy.signal.cont2discrete, dlsim", ours[0], theirs, "float64", T)


def test_fixed_cram(agree, random):
    x = random.normal(size=(B, T, 5))
    xi, _ = decayed_sum.parallel(x, 0.9, np.zeros((B, 5)))
    theirs = scipy.signal.lfilter([0.1], [1, -0.9], scipy.special.expit(x), axis=1)
    agree("CRAM, fixed scheme", "scipy.signal.lfilter", xi, theirs, "float64", T)
