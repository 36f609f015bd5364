"""`LinearAttentionForCausalLM` of flash-linear-attention (Yang & Zhang 2024), where its feature map and its normaliser are LAT's.

It divides by φ(q)·z + 1e-10, LAT by φ(q)·z + 1e-6, which rounds away unless nearly all features are 0.
"""

from __future__ import annotations

import math

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.published.plan import Plan, Settings

MAPS = {"elu": "elu1", "relu": "relu"}
BLOCK = 256  # its FFNs are a multiple of this wide


def fla(given: Settings) -> Plan:
    """config.json of `LinearAttentionForCausalLM`."""
    feature_map = given.values.get("feature_map", "elementwise_product")
    if not isinstance(feature_map, str) or feature_map not in MAPS:
        raise given.fail("feature_map", "not one of LAT's (nor is its default, elementwise_product)", "use one with 'elu' or 'relu'")
    if not given.flag("norm_feature_map", False):
        raise given.fail("norm_feature_map", "LAT divides by its normaliser", "use a checkpoint with norm_feature_map true")
    given.must("norm_q", False, why="LAT has no norm of φ(q)", remedy="use a checkpoint with norm_q false")
    given.must("norm_k", False, why="LAT has no norm of φ(k)", remedy="use a checkpoint with norm_k false")
    given.must("attn", why="it turns by RoPE in these layers alone, LAT in all or none", remedy="use a checkpoint without attention layers")
    given.must("attnres_block_size", why="residuals are sums here", remedy="use a checkpoint without it")
    given.must("hidden_act", "swish", "silu", why="FFNs are SwiGLU here", remedy="use a checkpoint with hidden_act 'swish'")
    given.must("norm_eps", 1e-6, why="ε of LAT's RMSNorm is 1e-6", remedy="use a checkpoint with norm_eps 1e-6")
    width, heads = given.integer("hidden_size", 2048), given.integer("num_heads", 4)
    if given.number("expand_v", 1.0) != 1:
        raise given.fail("expand_v", "values are as wide as the model here", "use a checkpoint with expand_v 1")
    keys = int(width * given.number("expand_k", 1.0))
    shared = given.integer("num_kv_heads", heads)  # heads of k and v, each read by several of q
    if keys < 1 or keys % heads or width % heads or heads % shared:
        raise given.fail("num_heads", f"does not divide hidden_size={width}, its keys and its num_kv_heads", "restore the file")
    ratio = given.number("hidden_ratio", 4)
    hidden = given.integer("intermediate_size", BLOCK * math.ceil(int(width * ratio * 2 / 3) / BLOCK))
    config = LATConfig(
        d_model=width,
        n_layers=given.integer("num_hidden_layers", 24, least=0, most=4096),
        vocab_size=given.integer("vocab_size", 32000),
        head_width=width // heads,
        feature_map=MAPS[feature_map],  # pyright: ignore[reportArgumentType]
        qk_width=keys // heads,
        head_norm=True,
        norm="rms",
        ffn="swiglu",
        ffn_mult=math.ceil(hidden / width),
        bias=False,
        tie_head=given.flag("tie_word_embeddings", False),
        head_bias=False,
    )
    return _plan(config, keys, heads // shared, hidden, given.flag("elementwise_affine", True))


def _plan(config: LATConfig, keys: int, group: int, hidden: int, affine: bool) -> Plan:
    """keys: q's width. group: heads of q that read one of k and v. hidden: the FFN's width. affine: whether a head's norm has a gain."""
    d = config.d_model
    tensors = {"model.embeddings.weight": (config.vocab_size, d), "model.norm.weight": (d,), "lm_head.weight": (config.vocab_size, d)}
    for i in range(config.n_layers):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.{norm}.weight": (d,) for norm in ("attn_norm", "mlp_norm")}
        rows = {"q": keys, "k": keys // group, "v": d // group, "o": d}
        tensors |= {f"{layer}.attn.{name}_proj.weight": (n, d) for name, n in rows.items()}
        tensors |= {f"{layer}.attn.norm.weight": (config.head_width,)} if affine else {}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": (hidden, d) for name in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = (d, hidden)

    def make(found: Arrays) -> Arrays:
        out = {"embedding.weight": found["model.embeddings.weight"], "norm.weight": found["model.norm.weight"]}
        out |= {} if config.tie_head else {"head.weight": found["lm_head.weight"]}
        idle = config.ffn_mult * d - hidden  # FFN units whose weights are 0: LAT's are a multiple of d wide
        for i in range(config.n_layers):
            ours, start = f"layers.{i}", f"model.layers.{i}."
            given = {name.removeprefix(start): a for name, a in found.items() if name.startswith(start)}
            k, v = (_each(given[f"attn.{n}_proj.weight"], width, group) for n, width in (("k", config.qk_width), ("v", config.head_width)))
            out |= {
                f"{ours}.mixer_norm.weight": given["attn_norm.weight"],
                f"{ours}.mixer.qkv.weight": np.concatenate([given["attn.q_proj.weight"], k, v]),
                f"{ours}.mixer.head_norm.weight": given["attn.norm.weight"] if affine else np.ones(config.head_width, k.dtype),
                f"{ours}.mixer.out.weight": given["attn.o_proj.weight"],
                f"{ours}.ffn_norm.weight": given["mlp_norm.weight"],
                f"{ours}.ffn.gate.weight": np.pad(given["mlp.gate_proj.weight"], ((0, idle), (0, 0))),
                f"{ours}.ffn.up.weight": np.pad(given["mlp.up_proj.weight"], ((0, idle), (0, 0))),
                f"{ours}.ffn.down.weight": np.pad(given["mlp.down_proj.weight"], ((0, 0), (0, idle))),
            }
        return {name: out[name] for name in config.params()}

    tied = ("model.embeddings.weight", "lm_head.weight") if config.tie_head else None
    return Plan(config, "flash-linear-attention", tensors, make, tied)


def _each(weight: np.ndarray, width: int, group: int) -> np.ndarray:
    """The rows of each head once for every head of q that reads it: [H/g · width, D] → [H · width, D]."""
    return np.repeat(weight.reshape(-1, width, weight.shape[1]), group, 0).reshape(-1, weight.shape[1])
