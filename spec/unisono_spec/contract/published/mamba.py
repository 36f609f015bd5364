"""Mamba as transformers writes it (state-spaces/mamba-*-hf; flash-linear-attention's has the same names), and as mamba_ssm does.

Both name a block's parameters as this project does. What a config says of initial values and of how to compute is read over.
"""

from __future__ import annotations

import math

from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.contract.published.plan import Plan, Settings

SILU = ("silu", "swish")
EPS = 1e-5  # of every norm in mamba_ssm, whose files do not say it


def transformers(given: Settings) -> Plan:
    """config.json of `MambaForCausalLM`."""
    given.must("hidden_act", *SILU, why="the gate and the convolution have SiLU here", remedy="use a checkpoint with hidden_act 'silu'")
    given.must("rms_norm", True, why="norms are RMSNorm here", remedy="use a checkpoint with RMSNorm")
    fla = "norm_eps" in given and "layer_norm_epsilon" not in given
    width, expand = given.integer("hidden_size", 2048 if fla else 768), _whole(given, "expand", 2)
    given.must("intermediate_size", expand * width, why=f"a block is expand × hidden_size = {expand * width} wide here")
    config = MambaConfig(
        d_model=width,
        n_layers=given.integer("num_hidden_layers", 48 if fla else 32, least=0, most=4096),
        vocab_size=given.integer("vocab_size", 32000 if fla else 50280),
        expand=expand,
        d_state=given.integer("state_size", 16, most=65536),
        conv_width=given.integer("conv_kernel", 4),
        dt_rank=_rank(given, "time_step_rank", width),
        bias=given.flag("use_bias", False),
        conv_bias=given.flag("use_conv_bias", True),
        tie_head=given.flag("tie_word_embeddings", not fla),
        norm_eps=_eps(given, "norm_eps" if fla else "layer_norm_epsilon"),
    )
    return _plan(config, "transformers", "backbone.embeddings")


def mamba_ssm(given: Settings) -> Plan:
    """config.json of `MambaLMHeadModel`, which lists its constructor's arguments; `ssm_cfg` lists those of each block."""
    given.known(
        *("d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple"),
        *("tie_embeddings", "d_intermediate", "attn_layer_idx", "attn_cfg", "norm_epsilon"),
    )
    given.must("rms_norm", True, why="norms are RMSNorm here", remedy="use a checkpoint with rms_norm true")
    given.must("d_intermediate", 0, why="blocks have no MLP here", remedy="use a checkpoint with d_intermediate 0")
    given.must("attn_layer_idx", [], why="there are no attention layers here", remedy="use a checkpoint without any")
    block = given.inner("ssm_cfg")
    block.must("layer", "Mamba1", why="this architecture is Mamba-1", remedy="use a Mamba-1 checkpoint")
    block.known(
        *("layer", "d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias", "use_fast_path"),
        *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),  # initial values alone
    )
    several = given.integer("pad_vocab_size_multiple", 8)
    width = given.integer("d_model")
    config = MambaConfig(
        d_model=width,
        n_layers=given.integer("n_layer", least=0, most=4096),
        vocab_size=several * math.ceil(given.integer("vocab_size") / several),  # the rows that no id reads are kept
        expand=_whole(block, "expand", 2),
        d_state=block.integer("d_state", 16, most=65536),
        conv_width=block.integer("d_conv", 4),
        dt_rank=_rank(block, "dt_rank", width),
        bias=block.flag("bias", False),
        conv_bias=block.flag("conv_bias", True),
        tie_head=given.flag("tie_embeddings", True),
        norm_eps=_eps(given, "norm_epsilon"),
    )
    return _plan(config, "mamba_ssm", "backbone.embedding")


def _whole(given: Settings, name: str, default: int) -> int:
    """A factor of widths: 2 and 2.0 are one."""
    value = given.number(name, default)
    if value != int(value) or value < 1:
        raise given.fail(name, "a block is a whole multiple of the model's width here", "use a checkpoint with a whole number")
    return int(value)


def _rank(given: Settings, name: str, width: int) -> int:
    """0 where it is the usual one, so that a config is its preset's however it was written."""
    usual = math.ceil(width / 16)
    rank = usual if given.values.get(name) == "auto" else given.integer(name, usual)
    return 0 if rank == usual else rank


def _eps(given: Settings, name: str) -> float:
    value = given.number(name, EPS)
    if not 0 < value <= 1:
        raise given.fail(name, "the ε of a norm is in (0, 1] here", "restore the file")
    return value


def _plan(config: MambaConfig, naming: str, embedding: str) -> Plan:
    """`embedding` is where the two namings differ."""

    def published(name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        known = {"embedding": embedding, "norm": "backbone.norm_f", "head": "lm_head"}
        return f"{known.get(owner, f'backbone.{owner}')}.{leaf}"

    names = {name: published(name) for name in config.params()}
    tensors = {names[name]: p.shape for name, p in config.params().items()}
    tied = (f"{embedding}.weight", "lm_head.weight") if config.tie_head else None
    if tied:
        tensors[tied[1]] = tensors[tied[0]]
    return Plan(config, naming, tensors, lambda found: {name: found[other] for name, other in names.items()}, tied)
