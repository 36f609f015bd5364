"""The spec against PyTorch and onnx: in `python -m nox -s onnx` too. Differences are relative to the largest value."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F
from unisono_spec.ops import (
    features,
    linear_attention,
    mom_gru,
    short_conv,
    softmax_attention,
    window,
)

B, T, H, K, V = 2, 64, 3, 8, 16


def _tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(a) for a in arrays]


def test_elu1(agree, random):
    x = 8 * random.normal(size=100)
    agree("elu1", "torch.nn.functional.elu", features.elu1(x), F.elu(torch.tensor(x)) + 1, "float64", 1)


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


def test_short_convolution(agree, random):
    x, weight, bias = random.normal(size=(B, T, 5)), random.normal(size=(5, 1, 4)), random.normal(size=5)
    ours, _ = short_conv.parallel(x, weight, bias, np.zeros((B, 3, 5)))
    tensor = F.pad(torch.tensor(x).transpose(1, 2), (3, 0))
    theirs = F.conv1d(tensor, torch.tensor(weight), torch.tensor(bias), groups=5).transpose(1, 2)
    agree("short convolution", "torch conv1d", ours, theirs, "float64", 4)


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
