"""The spec against flash-linear-attention and transformers: `python -m nox -s oracles`. Differences are relative to the largest value."""

from __future__ import annotations

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from unisono_spec.contract import init_params
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.models import create
from unisono_spec.ops import (
    features,
    linear_attention,
    multiscale,
    rotary,
)

B, T, H, K, V = 2, 64, 3, 8, 16


@pytest.fixture(scope="session", autouse=True)
def flash_linear_attention() -> None:
    """Its first import warns of what its kernels would like to find; its naive references need none of that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in ("based", "gla", "linear_attn"):
            importlib.import_module(f"fla.ops.{module}.naive")


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


def test_rotary(agree, qkv):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    position = np.arange(T)
    angles = np.outer(position, 10000.0 ** (-np.arange(0, K, 2) / K))
    cos, sin = _tensors(*(np.concatenate([f(angles)] * 2, -1)[None] for f in (np.cos, np.sin)))
    q = torch.tensor(qkv[0]).transpose(1, 2)
    theirs, _ = apply_rotary_pos_emb(q, q, cos, sin)
    ours = rotary.rotate(qkv[0], np.broadcast_to(position, (B, T)))
    agree("RoPE", "transformers Llama", ours, theirs.transpose(1, 2), "float64", T)


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
