"""Published checkpoints, made at random by their own libraries and read by `from_hf`: `python -m nox -s oracles`."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F
from unisono_spec import from_hf
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.published import read
from unisono_spec.layers import lat as lat_layer
from unisono_spec.layers.params import exact
from unisono_spec.ops import linear_attention
from unisono_spec.ops.elementwise import rms_norm

B, T, V = 2, 64, 29
MORE = 64  # tokens that both write


@pytest.fixture
def tokens(random) -> np.ndarray:
    return random.integers(0, V, (B, T))


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """In float64, with noise on every weight: initial biases are 0 and gains 1, which would hide a forgotten one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.double().eval()


MAMBA = {
    "state-spaces": {"state_size": 5, "time_step_rank": 3},
    "untied": {"state_size": 4, "expand": 1, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=MAMBA)
def mamba(request, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A model of transformers and what its save_pretrained leaves, in several files."""
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "residual_in_fp32": False}
    torch.manual_seed(1)
    model = shaken(MambaForCausalLM(MambaConfig(**sizes, **MAMBA[request.param])))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model, folder


def test_mamba(agree, mamba, tokens):
    """Logits of a whole reading, the state after it, and 64 tokens of greedy text that go on from there."""
    model, folder = mamba
    ours = from_hf(folder)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), use_cache=True)
        text = model.generate(torch.tensor(tokens), max_new_tokens=MORE, do_sample=False, pad_token_id=0, eos_token_id=None)
    oracle = f"transformers Mamba, {folder.name.rstrip('0')}"
    logits, state = ours.forward(tokens)
    agree("published Mamba, logits", oracle, logits, theirs.logits, "float32", T)
    cache = getattr(theirs, "cache", None) or theirs.cache_params
    held: list[torch.Tensor] = []
    for layer in cache.layers:
        conv, ssm = (next(iter(a.values())) if isinstance(a, dict) else a for a in (layer.conv_states, layer.recurrent_states))
        held += [conv.transpose(1, 2)[:, 1:], ssm]  # the first of the convolution's inputs is read no more
    mine, other = (np.concatenate([np.asarray(a).ravel() for a in arrays]) for arrays in (state.values(), held))
    agree("published Mamba, state", oracle, mine, other, "float32", T)
    written = ours.generate(tokens[:, -1:], MORE, state=ours.forward(tokens[:, :-1])[1])
    assert not written.near_ties.any()
    assert np.array_equal(written.tokens, text[:, T:])


def test_mamba_ssm_s_naming(mamba, tmp_path):
    """The same weights as mamba_ssm names them, by its own list of settings."""
    model, folder = mamba
    c, other = model.config, read(folder)
    block = {"d_state": c.state_size, "d_conv": c.conv_kernel, "expand": c.expand, "dt_rank": c.time_step_rank}
    block |= {"bias": c.use_bias, "conv_bias": c.use_conv_bias}
    values = {"d_model": 16, "n_layer": 2, "vocab_size": V - 2, "ssm_cfg": block, "rms_norm": True, "pad_vocab_size_multiple": V}
    (tmp_path / "config.json").write_text(json.dumps({**values, "tie_embeddings": c.tie_word_embeddings}))
    tensors = {name: a.numpy() for name, a in model.state_dict().items()}
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    found = read(tmp_path)
    assert found.config == other.config
    assert all(np.array_equal(a, other.params[name]) for name, a in found.params.items())


@pytest.fixture(scope="session")
def fla() -> None:
    """Its first import warns of what its kernels would like to find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in ("layers.based", "models.linear_attn", "ops.linear_attn.naive"):
            importlib.import_module(f"fla.{module}")


@pytest.mark.parametrize("change", [{}, {"feature_map": "relu", "num_kv_heads": 2, "expand_k": 0.5, "tie_word_embeddings": True}])
def test_linear_attention(agree, fla, tokens, tmp_path, monkeypatch, change):
    """fla's model, with its naive recurrence and torch's norms and activations in the place of kernels that need a GPU."""
    from fla.layers import linear_attn as layers
    from fla.models import LinearAttentionConfig, LinearAttentionForCausalLM
    from fla.modules import mlp
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    def recurrent(q, k, v, initial_state, output_final_state, normalize, cu_seqlens):
        return naive_recurrent_linear_attn(q, k, v, None, initial_state, output_final_state, normalize)

    for name in ("fused_recurrent_linear_attn", "fused_chunk_linear_attn", "chunk_linear_attn"):
        monkeypatch.setattr(layers, name, recurrent)
    monkeypatch.setattr(layers, "RMSNorm", lambda hidden_size, elementwise_affine, eps, dtype: torch.nn.RMSNorm(hidden_size, eps))
    monkeypatch.setattr(layers, "elu_p1", lambda x: F.elu(x) + 1)
    monkeypatch.setattr(mlp, "swiglu", lambda gate, x: F.silu(gate) * x)
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 40}
    plain = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False, "norm_feature_map": True, "feature_map": "elu"}
    torch.manual_seed(1)
    model = shaken(LinearAttentionForCausalLM(LinearAttentionConfig(**{**sizes, **plain, **change})))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), use_cache=False).logits
    what = "relu, shared heads" if change else "elu"
    agree(
        f"published LAT, logits ({what})",
        "flash-linear-attention, naive recurrence",
        from_hf(tmp_path).forward(tokens)[0],
        theirs,
        "float32",
        T,
    )


def test_based_s_layer(agree, fla, random):
    """fla has a layer of Based and no model of it: LAT's linear attention under taylor2, with rows of q, k and v in one matrix."""
    from fla.layers.based import BasedLinearAttention

    torch.manual_seed(1)
    layer = shaken(BasedLinearAttention(hidden_size=12, feature_dim=4, num_heads=3, num_key_value_heads=3))
    p = {name: a.numpy() for name, a in layer.state_dict().items()}
    ours = {"mixer.qkv.weight": np.concatenate([p[f"{n}_proj.weight"] for n in "qkv"]), "mixer.out.weight": p["o_proj.weight"]}
    config = LATConfig(d_model=12, n_layers=1, head_width=4, qk_width=4, feature_map="taylor2", bias=False)
    x = random.normal(size=(B, T, 12))
    weights = {"mixer_norm.weight": np.ones(12), **ours}
    heads = lat_layer.to_heads(weights, config, "linear", x, np.zeros((B, T), np.int32), exact)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its feature map checkpoints in a way that torch deprecates
        # what the layer is given here is what its block's norm would give it
        theirs = layer.forward_reference(torch.tensor(rms_norm(x, np.ones(12))))
    o, _ = linear_attention.parallel(*heads, (np.zeros((B, 3, 21, 4)), np.zeros((B, 3, 21))))
    agree("Based's layer", "fla.layers.based", lat_layer.from_heads(weights, o, exact), theirs, "float32", T)
