"""Steps of models in few launches: each layer's norms, products and activations in one, its op in place of the state before it.

What is not here is read by `Model.step`'s own operations, in the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from unisono_spec.contract.base import ANY

from unisono_torch.decoding import cram, recurrent
from unisono_torch.decoding.parts import Held, Parts, next_norm
from unisono_torch.decoding.recurrent import Step
from unisono_torch.kernels.registry import available
from unisono_torch.ops import rotary

if TYPE_CHECKING:
    from unisono_torch.models.base import Model, State

MOST_WINDOW = 128  # keys that a program holds at once


def buffers(state: State) -> State:
    """Copies in memory that lies as the shapes say, whatever strides an op left a state with."""
    return {name: a.new_empty(a.shape).copy_(a) for name, a in state.items()}


def fused(model: Model, state: State, held: Held) -> tuple[State, Step] | None:
    """Buffers for the state, filled with it, and the step that advances them; None where there is none for this model here.

    Caches of softmax attention are held in the compute dtype, in which they were computed.
    """
    build = _BUILDERS.get(model.config.arch)
    if build is None or model.compute_dtype == torch.float64 or not available(model.device) or model.implementation == "plain":
        return None
    caches = {name for name, s in model.config.states().items() if ANY in s.shape}
    own = buffers({name: a for name, a in state.items() if name not in caches})
    for name in caches:
        own[name] = state[name].new_empty(state[name].shape, dtype=model.compute_dtype).copy_(state[name])
    step = build(model, own, Parts(model, held, len(next(iter(state.values())))))
    return None if step is None else (own, step)


def _lat(model: Any, state: State, parts: Parts) -> Step:
    from unisono_torch.kernels.decode import attention

    blocks, position = model.blocks, state["position"]
    tables = {}
    for width in model.turned:
        made = torch.from_numpy(rotary.prepare(width, blocks.rope_base)).to(position.device, torch.float32)
        tables[width] = made.contiguous()
    layers = []
    for i, block in enumerate(model.layers):
        own = [state[f"layers.{i}.{part}"] for part in block.states]
        ffn = parts.ffn(block.ffn, block.ffn_norm, next_norm(model, i, "mixer_norm"), _apart(block, parts))
        layers.append((_mixer(block, own, position, parts), ffn))
    embedding, head = parts.embedding(model), parts.head(model)
    learned = None if model.position_embedding is None else model.position_embedding.weight.detach()

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        if learned is not None:
            x = x + nn.functional.embedding(position, learned).to(x.dtype)
        rotaries = {width: attention.cos_sin(position, table) for width, table in tables.items()}
        for mixer, ffn in layers:
            x = mixer(x, rotaries)
            x = ffn(x, x)
        position.add_(1)
        return head(x)

    return step


def _apart(block: Any, parts: Parts) -> bool:
    """Whether a mixer's projection has a launch of its own, and the FFN's two products one: programs that wait for those of softmax
    attention of few sequences cost more."""
    from unisono_torch.kernels.decode.project import MOST

    return getattr(block.mixer, "kind", "") == "softmax" and not parts.joined and parts.batch <= MOST


def _mixer(block: Any, state: Sequence[Tensor], position: Tensor, parts: Parts) -> Callable[[Tensor, dict], Tensor]:
    """x [B, D] and the rotations by width → x and what the mixer adds to it."""
    from unisono_torch.kernels.decode import attention, scans, windows

    mixer = block.mixer
    if block.states == ("conv",):
        into, weight = parts.linear(mixer.input, block.mixer_norm), mixer.conv.weight.detach()
        bias = None if mixer.conv.bias is None else mixer.conv.bias.detach()
        out = parts.finish(mixer.out, 0, following=block.ffn_norm)
        return lambda x, rotaries: scans.conv_step(into(x), state[0], weight, bias, out, x)
    apart = _apart(block, parts)
    finish = parts.finish(mixer.out, len(state[0]) * mixer.heads, apart, None if apart else block.ffn_norm)
    qkv, width = parts.linear(mixer.qkv, block.mixer_norm), mixer.width
    if mixer.kind == "linear":
        tau, norm = None if mixer.tau is None else mixer.tau.detach(), parts.norm(mixer.head_norm)
        S, z = state
        return lambda x, rotaries: attention.linear_step(qkv(x), S, z, width, mixer.feature_map, tau, rotaries.get(width), finish, x, norm)
    keys, values = state
    if mixer.kind == "window":
        if keys.shape[1] > MOST_WINDOW:
            return lambda x, rotaries: windows.window_step(qkv(x), keys, values, position, rotaries.get(width), finish, x)
        return lambda x, rotaries: attention.window_step(qkv(x), keys, values, position, rotaries.get(width), finish, x)
    if not apart:
        return lambda x, rotaries: attention.softmax_step(qkv(x), keys, values, position, rotaries.get(width), finish, x)
    out = parts.linear(mixer.out, following=block.ffn_norm)
    return lambda x, rotaries: out(attention.softmax_step(qkv(x), keys, values, position, rotaries.get(width), finish, None), x)


def _infinityformer(model: Any, state: State, parts: Parts) -> Step:
    from unisono_torch.kernels.decode import attention

    config, position = model.config, state["position"]
    table = None
    if config.rope != "none":
        table = torch.from_numpy(rotary.prepare(config.head_width, config.rope_base)).to(position.device, torch.float32).contiguous()

    def layer(block: Any, S: Tensor, z: Tensor, last: nn.Module) -> Callable[[Tensor, Any], Tensor]:
        mixer, vector = block.mixer, config.gate == "vector"
        qkv = parts.linear(mixer.qkv, block.mixer_norm)
        finish = parts.finish(mixer.out, len(S) * config.n_heads, following=block.ffn_norm)
        gate, decay, mix = mixer.gate, mixer.decay, mixer.mix
        asked = [(gate.weight, gate.bias)] + ([] if decay.weight is None else [(decay.weight, decay.bias)])
        weight, bias = (parts.held(lambda i=i: torch.cat([pair[i].detach().float() for pair in asked])) for i in range(2))
        mixed = parts.held(lambda: torch.cat([mix.detach().float(), decay.bias.detach().float()]))
        tau, ffn = None if mixer.tau is None else mixer.tau.detach(), parts.ffn(block.ffn, block.ffn_norm, last)
        how = vector, config.feature_map, tau

        def step(x: Tensor, rotary: Any) -> Tensor:
            gates = x.new_empty((len(x), len(weight)), dtype=weight.dtype)
            heads = qkv(x, beside=(weight, bias, gates))
            x = attention.multiscale_step(heads, gates, mixed, S, z, *how, rotary, config.rope == "numerator", finish, x)
            return ffn(x, x)

        return step

    layers = [
        layer(block, state[f"layers.{i}.S"], state[f"layers.{i}.z"], next_norm(model, i, "mixer_norm"))
        for i, block in enumerate(model.layers)
    ]
    embedding, head = parts.embedding(model), parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        rotary = None if table is None else attention.cos_sin(position, table)
        for one in layers:
            x = one(x, rotary)
        position.add_(1)
        return head(x)

    return step


_BUILDERS: dict[str, Callable[[Any, State, Parts], Step | None]] = {
    "lat": _lat,
    "transformer": _lat,
    "mamba": recurrent.mamba,
    "s4d": recurrent.s4d,
    "cram": cram.cram,
    "infinityformer": _infinityformer,
    "maru": recurrent.maru,
}
