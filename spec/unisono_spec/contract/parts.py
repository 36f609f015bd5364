"""Parameters of the pieces that several architectures are made of. Matrices decay; vectors, embeddings and dynamics do not."""

from __future__ import annotations

import math

from unisono_spec.contract.base import Param, State
from unisono_spec.contract.initial import ONES, ZEROS, Initial, normal, softplus_log_uniform, uniform, values

STD = 0.02


def residual_std(n_layers: int) -> float:
    """Of the last Linear of each residual branch (Radford et al. 2019, section 2.3): two branches a layer."""
    return STD / (2 * max(n_layers, 1)) ** 0.5


def embedding(name: str, vocab_size: int, width: int) -> dict[str, Param]:
    return {f"{name}.weight": Param((vocab_size, width), normal(STD))}


def linear(name: str, out: int, into: int, bias: bool = True, std: float = STD, initial: Initial | None = None) -> dict[str, Param]:
    """weight [out, in], and a zero bias [out]."""
    params = {f"{name}.weight": Param((out, into), initial or normal(std), weight_decay=True)}
    return {**params, f"{name}.bias": Param((out,), ZEROS)} if bias else params


def norm(name: str, width: int, kind: str = "layer") -> dict[str, Param]:
    """LayerNorm has weight and bias, RMSNorm a weight."""
    weight = {f"{name}.weight": Param((width,), ONES)}
    return weight if kind == "rms" else {**weight, f"{name}.bias": Param((width,), ZEROS)}


def conv(name: str, channels: int, width: int, bias: bool = True) -> dict[str, Param]:
    """A depthwise convolution: weight [channels, 1, width], the last tap on the token itself."""
    bound = width**-0.5
    params = {f"{name}.weight": Param((channels, 1, width), uniform(-bound, bound), weight_decay=True)}
    return {**params, f"{name}.bias": Param((channels,), ZEROS)} if bias else params


def mamba(
    name: str, d_model: int, expand: int, d_state: int, conv_width: int, dt_rank: int, bias: bool, conv_bias: bool, out_std: float
) -> dict[str, Param]:
    """One Mamba block under the names of the published checkpoints."""
    inner = expand * d_model
    bound = dt_rank**-0.5
    return {
        **linear(f"{name}.in_proj", 2 * inner, d_model, bias),
        **conv(f"{name}.conv1d", inner, conv_width, conv_bias),
        **linear(f"{name}.x_proj", dt_rank + 2 * d_state, inner, bias=False),
        f"{name}.dt_proj.weight": Param((inner, dt_rank), uniform(-bound, bound), weight_decay=True),
        f"{name}.dt_proj.bias": Param((inner,), softplus_log_uniform(1e-3, 1e-1)),
        f"{name}.A_log": Param((inner, d_state), values(*(math.log(n) for n in range(1, d_state + 1)))),
        f"{name}.D": Param((inner,), ONES),
        **linear(f"{name}.out_proj", d_model, inner, bias, std=out_std),
    }


def head(vocab_size: int, width: int, tied: bool, bias: bool) -> dict[str, Param]:
    """The readout: its weight is the embedding's where tied."""
    if not tied:
        return linear("head", vocab_size, width, bias)
    return {"head.bias": Param((vocab_size,), ZEROS)} if bias else {}


def mamba_states(layer: str, inner: int, conv_width: int, d_state: int) -> dict[str, State]:
    """The last inputs of a block's convolution, oldest first, and h."""
    return {f"{layer}.conv": State((conv_width - 1, inner)), f"{layer}.ssm": State((inner, d_state))}
