"""Published checkpoints without any framework: both namings of Mamba, flash-linear-attention's LAT, shards, ties, dtypes, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from unisono_spec import InputError, from_hf
from unisono_spec.contract import Arrays, preset
from unisono_spec.contract.published import plan_of, read

V, D, N, RANK, TAPS = 11, 4, 3, 2, 3  # of Mamba
HF: dict[str, Any] = {
    "model_type": "mamba", "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "state_size": N, "time_step_rank": RANK,
    "conv_kernel": TAPS, "expand": 2, "use_bias": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SSM: dict[str, Any] = {
    "d_model": D, "n_layer": 2, "vocab_size": V - 3, "pad_vocab_size_multiple": V, "rms_norm": True, "fused_add_norm": True,
    "residual_in_fp32": True, "ssm_cfg": {"d_state": N, "dt_rank": RANK, "d_conv": TAPS, "bias": True},
}  # fmt: skip
FLA: dict[str, Any] = {
    "model_type": "linear_attn", "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 4, "num_kv_heads": 2,
    "feature_map": "elu", "norm_feature_map": True, "intermediate_size": 12, "expand_k": 0.5,
}  # fmt: skip


# config.json of state-spaces/mamba-130m-hf
STATE_SPACES: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768, "eos_token_id": 0,
    "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05, "model_type": "mamba", "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0,
    "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {},
    "state_size": 16, "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0", "use_bias": False,
    "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip


def drawn(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    random = np.random.default_rng(5)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def mamba(embedding: str = "embeddings", head: bool = True) -> Arrays:
    block = {
        "norm.weight": (D,), "mixer.in_proj.weight": (4 * D, D), "mixer.in_proj.bias": (4 * D,), "mixer.conv1d.weight": (2 * D, 1, TAPS),
        "mixer.conv1d.bias": (2 * D,), "mixer.x_proj.weight": (RANK + 2 * N, 2 * D), "mixer.dt_proj.weight": (2 * D, RANK),
        "mixer.dt_proj.bias": (2 * D,), "mixer.A_log": (2 * D, N), "mixer.D": (2 * D,), "mixer.out_proj.weight": (D, 2 * D),
        "mixer.out_proj.bias": (D,),
    }  # fmt: skip
    layers = {f"backbone.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    ends = {f"backbone.{embedding}.weight": (V, D), "backbone.norm_f.weight": (D,), **({"lm_head.weight": (V, D)} if head else {})}
    return drawn({**layers, **ends})


def attention() -> Arrays:
    shapes = {"attn.q_proj": (4, 8), "attn.k_proj": (2, 8), "attn.v_proj": (4, 8), "attn.o_proj": (8, 8), "attn.norm": (2,)}
    shapes |= {"attn_norm": (8,), "mlp_norm": (8,), "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
    layer = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    return drawn({**layer, "model.embeddings.weight": (V, 8), "model.norm.weight": (8,), "lm_head.weight": (V, 8)})


def write(folder: Path, config: Any, *shards: Arrays) -> Path:
    """A checkpoint's folder; several shards stand under an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return folder
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for name, shard in files.items():
        save_file(shard, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {tensor: name for name, shard in files.items() for tensor in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def without(arrays: Arrays, *names: str) -> Arrays:
    return {name: a for name, a in arrays.items() if name not in names}


def test_transformers_naming(tmp_path: Path) -> None:
    tensors = mamba()
    found = read(write(tmp_path, HF, tensors))
    c = found.config
    assert (c.arch, c.d_model, c.n_layers, c.vocab_size, c.norm_eps) == ("mamba", D, 2, V, 1e-5)
    renamed = {"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight", "head.weight": "lm_head.weight"}
    assert set(found.params) == set(c.params())
    for name, a in found.params.items():
        assert np.array_equal(a, tensors[renamed.get(name, f"backbone.{name}")]), name
    assert np.isfinite(from_hf(tmp_path).forward(np.arange(V)[None])[0]).all()


def test_mamba_ssm_naming_is_the_same_model(tmp_path: Path) -> None:
    """Its vocabulary is padded to a multiple, its head tied; with the other naming's default for ε."""
    tensors = without(mamba("embedding"), "lm_head.weight")
    tied = {**tensors, "lm_head.weight": tensors["backbone.embedding.weight"]}
    found = read(write(tmp_path / "ssm", SSM, tied))
    other = {name.replace(".embedding.", ".embeddings."): a for name, a in tensors.items()}
    same = read(write(tmp_path / "hf", {**HF, "tie_word_embeddings": True}, other))
    assert found.config == same.config
    assert found.config.norm_eps == 1e-5
    assert found.naming == "mamba_ssm"
    assert all(np.array_equal(a, same.params[name]) for name, a in found.params.items())


def test_defaults_are_the_library_s(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mamba", "time_step_rank": "auto"}')
    c: Any = plan_of(path).config
    assert (c.d_model, c.n_layers, c.vocab_size, c.rank, c.tie_head, c.norm_eps) == (768, 32, 50280, 48, True, 1e-5)
    path.write_text(json.dumps(STATE_SPACES))
    assert plan_of(path).config == preset("mamba-130m", norm_eps=1e-5)
    path.write_text('{"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}')
    c = plan_of(path).config
    assert (c.d_model, c.n_layers, c.vocab_size, c.rank, c.tie_head) == (2560, 64, 50280, 160, True)


def test_linear_attention_s_heads_and_idle_units(tmp_path: Path) -> None:
    tensors, p = attention(), "model.layers.0."
    found = read(write(tmp_path, FLA, tensors))
    qkv = found.params["layers.0.mixer.qkv.weight"]
    q, k, v = (tensors[f"{p}attn.{name}_proj.weight"] for name in "qkv")
    assert np.array_equal(qkv[:4], q)
    assert np.array_equal(qkv[4:8], k[[0, 0, 1, 1]])  # heads of width 1, each read by two of q
    assert np.array_equal(qkv[8:], v[[0, 1, 0, 1, 2, 3, 2, 3]])  # of width 2
    assert found.config.to_dict()["ffn_mult"] == 2
    up, down = found.params["layers.0.ffn.up.weight"], found.params["layers.0.ffn.down.weight"]
    assert np.array_equal(up[:12], tensors[f"{p}mlp.up_proj.weight"])
    assert not up[12:].any()
    assert not down[:, 12:].any()
    bare = read(write(tmp_path, {**FLA, "elementwise_affine": False}, without(tensors, f"{p}attn.norm.weight")))
    assert np.array_equal(bare.params["layers.0.mixer.head_norm.weight"], np.ones(2))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_weights_come_exactly(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: a.astype(dtype) for name, a in mamba().items()}
    found = read(write(tmp_path, HF, tensors)).params
    assert {a.dtype for a in found.values()} == {np.dtype(np.float32)}
    assert np.array_equal(found["layers.1.mixer.A_log"], tensors["backbone.layers.1.mixer.A_log"].astype(np.float32))


def test_shards(tmp_path: Path) -> None:
    tensors = mamba()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[i::3]} for i in range(3)]
    whole, sharded = read(write(tmp_path / "whole", HF, tensors)), read(write(tmp_path / "sharded", HF, *parts))
    assert all(np.array_equal(a, sharded.params[name]) for name, a in whole.params.items())
    index = tmp_path / "sharded/model.safetensors.index.json"
    text = index.read_text()
    first = "model-00001-of-00003.safetensors"
    for bad, said in (
        (text.replace(first, "../whole/model.safetensors"), "weight_map"),
        (text.replace(first, "model-00009-of-00003.safetensors"), "is missing"),
        (text.replace('"lm_head.weight": "', '"x": "'), "says"),
        ("{}", "weight_map"),
        ("[", "not JSON"),
    ):
        index.write_text(bad)
        with pytest.raises(InputError, match=said):
            read(tmp_path / "sharded")
    index.write_text(text)
    save_file({**parts[0], names[1]: tensors[names[1]]}, tmp_path / "sharded" / first)
    with pytest.raises(InputError, match=first):
        read(tmp_path / "sharded")


def test_one_file_and_its_config(tmp_path: Path) -> None:
    write(tmp_path, HF, mamba())
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert read(tmp_path / "other.safetensors").config.d_model == D


def test_tied_heads(tmp_path: Path) -> None:
    config, tensors = {**HF, "tie_word_embeddings": True}, mamba()
    assert "head.weight" not in read(write(tmp_path, config, without(tensors, "lm_head.weight"))).params
    other = read(write(tmp_path, config, without(tensors, "backbone.embeddings.weight"))).params
    assert np.array_equal(other["embedding.weight"], tensors["lm_head.weight"])
    with pytest.raises(InputError, match=r"missing: backbone\.embeddings"):
        read(write(tmp_path, config, without(tensors, "backbone.embeddings.weight", "lm_head.weight")))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from backbone\.embeddings\.weight"):
        read(write(tmp_path, config, tensors))
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        read(write(tmp_path, HF, without(tensors, "lm_head.weight")))


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (HF, {"model_type": "mamba2"}, "model_type: 'mamba2'"),
    (HF, {"model_type": "falcon_mamba"}, "model_type: 'falcon_mamba'"),
    (HF, {"model_type": ["mamba"]}, "model_type"),
    (HF, {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    (HF, {"intermediate_size": 9}, "intermediate_size: 9"),
    (HF, {"rms_norm": False}, "rms_norm: False"),
    (HF, {"layer_norm_epsilon": 0}, "layer_norm_epsilon: 0"),
    (HF, {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
    (HF, {"use_bias": 1}, "use_bias: 1"),
    (HF, {"expand": 1.5}, "expand: 1.5"),
    (HF, {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    (HF, {"hidden_size": 2**40}, "hidden_size"),
    (HF, {"time_step_rank": "much"}, "time_step_rank: 'much'"),
    (HF, {"auto_map": {"AutoModel": "modeling.X"}}, "auto_map"),
    (HF, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (HF, {"state_size": N + 1}, "has shape"),
    (HF, {"use_conv_bias": False}, r"unknown: backbone\.layers\.0\.mixer\.conv1d\.bias"),
    (HF, {"num_hidden_layers": 3}, r"missing: backbone\.layers\.2\.\S+, \S+, \S+, \S+ and 8 more"),
    (SSM, {"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg: layer: 'Mamba2'"),
    (SSM, {"ssm_cfg": {"headdim": 64}}, "ssm_cfg: 'headdim'"),
    (SSM, {"ssm_cfg": 3}, "ssm_cfg: 3"),
    (SSM, {"rms_norm": False}, "rms_norm: False"),
    (SSM, {"attn_layer_idx": [1]}, "attn_layer_idx"),
    (SSM, {"d_intermediate": 64}, "d_intermediate: 64"),
    (SSM, {"bidirectional": True}, "bidirectional"),
    (SSM, {"n_layer": None}, "n_layer: missing"),
    (FLA, {"feature_map": None}, "feature_map"),
    (FLA, {"feature_map": ["elu"]}, "feature_map"),
    (FLA, {"norm_feature_map": False}, "norm_feature_map: False"),
    (FLA, {"norm_q": True}, "norm_q: True"),
    (FLA, {"attn": {"layers": [0]}}, "attn"),
    (FLA, {"attnres_block_size": 2}, "attnres_block_size: 2"),
    (FLA, {"norm_eps": 1e-5}, "norm_eps: 1e-05"),
    (FLA, {"expand_v": 2.0}, "expand_v: 2.0"),
    (FLA, {"num_heads": 3}, "num_heads: 3"),
    ({}, {"alt_mixer": {}, "model_type": "gpt2"}, "alt_mixer"),
]


@pytest.mark.parametrize(("config", "change", "said"), REFUSED)
def test_other_models_are_refused_by_the_field(tmp_path: Path, config: dict[str, Any], change: dict[str, Any], said: str) -> None:
    tensors = attention() if config is FLA else mamba("embedding") if config is SSM else mamba()
    with pytest.raises(InputError, match=said) as error:
        read(write(tmp_path, {**config, **change}, tensors))
    assert ";" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "null", '{"model_type": "mamba", "hidden_size": NaN}', "[" * 10**5])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    write(tmp_path, HF, mamba())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    def again(change: Callable[[Arrays], Arrays]) -> Path:
        return write(tmp_path, HF, change(mamba()))

    for change, said in (
        (lambda a: {**a, "lm_head.weight": a["lm_head.weight"].astype(np.int32)}, "is of int32"),
        (lambda a: {**a, "lm_head.weight": a["lm_head.weight"].astype(np.int8)}, "I8"),
        (lambda a: {**a, "lm_head.weight": a["lm_head.weight"] * np.nan}, "NaN"),
        (lambda a: {**a, "extra": a["lm_head.weight"]}, "unknown: extra"),
    ):
        with pytest.raises(InputError, match=said):
            read(again(change))
    file = again(dict) / "model.safetensors"
    whole = file.read_bytes()
    for data in (b"", whole[:100], whole[:-5], b"\xff" * 64):
        file.write_bytes(data)
        with pytest.raises(InputError, match="safetensors"):
            read(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    write(tmp_path, HF, mamba())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, a pickle"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"\.bin is a pickle"):
        read(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "", "~nobody/x\0", "hf:", "hf:a", 3, "x" * 5000])
def test_no_such_place(source: Any) -> None:
    with pytest.raises(InputError, match=r"no such folder|type int"):
        read(source)


def test_sizes_beyond_memory_are_not_built(tmp_path: Path) -> None:
    write(tmp_path, {**HF, "vocab_size": 2**30, "hidden_size": 2**20}, mamba())
    with pytest.raises(InputError, match="has shape"):
        read(tmp_path)


def test_every_tensor_is_used_once(tmp_path: Path) -> None:
    """Numbers go in and come out: none is lost, but for the padding of an FFN and heads that are shared."""
    found = read(write(tmp_path, HF, mamba()))
    assert sum(a.size for a in found.params.values()) == sum(a.size for a in mamba().values())
