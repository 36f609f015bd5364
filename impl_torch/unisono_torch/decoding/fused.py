"""Steps of models in few launches: each layer's norms, products and activations in one, its op in place of the state before it.

What is not here is read by `Model.step`'s own operations, in the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from unisono_spec.contract.base import ANY

from unisono_torch.decoding.parts import Held, Parts
from unisono_torch.kernels.registry import available
from unisono_torch.ops import rotary

if TYPE_CHECKING:
    from unisono_torch.models.base import Model, State

Step = Callable[[Tensor], Tensor]  # token [B] → logits [B, V]
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


def _lat(model: Any, state: State, parts: Parts) -> Step | None:
    from unisono_torch.kernels.decode import attention

    blocks, position = model.blocks, state["position"]
    if "window" in blocks.kinds and blocks.window > MOST_WINDOW:
        return None
    tables = {}
    for width in model.turned:
        made = torch.from_numpy(rotary.prepare(width, blocks.rope_base)).to(position.device, torch.float32)
        tables[width] = made.contiguous()
    layers = []
    for i, block in enumerate(model.layers):
        own = [state[f"layers.{i}.{part}"] for part in block.states]
        ffn = parts.ffn(block.ffn, block.ffn_norm, _next_norm(model, i, "mixer_norm"))
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


def _next_norm(model: Any, i: int, name: str) -> nn.Module:
    """Of what layer i makes."""
    return getattr(model.layers[i + 1], name) if i + 1 < len(model.layers) else model.norm


def _mixer(block: Any, state: Sequence[Tensor], position: Tensor, parts: Parts) -> Callable[[Tensor, dict], Tensor]:
    """x [B, D] and the rotations by width → x and what the mixer adds to it."""
    from unisono_torch.kernels.decode import attention, scans
    from unisono_torch.kernels.decode.project import MOST

    mixer = block.mixer
    if block.states == ("conv",):
        into, weight = parts.linear(mixer.input, block.mixer_norm), mixer.conv.weight.detach()
        bias = None if mixer.conv.bias is None else mixer.conv.bias.detach()
        out = parts.finish(mixer.out, 0, following=block.ffn_norm)
        return lambda x, rotaries: scans.conv_step(into(x), state[0], weight, bias, out, x)
    normed = getattr(mixer, "head_norm", None)
    # programs that wait for those of softmax attention of few sequences cost more than a launch of their own
    alone = normed is not None or (mixer.kind == "softmax" and parts.batch <= MOST)
    finish = parts.finish(mixer.out, len(state[0]) * mixer.heads, alone, None if alone else block.ffn_norm)
    qkv, width = parts.linear(mixer.qkv, block.mixer_norm), mixer.width
    if mixer.kind == "linear":
        tau = None if mixer.tau is None else mixer.tau.detach()
        S, z = state

        def linear(x: Tensor, rotaries: dict) -> Tensor:
            return attention.linear_step(qkv(x), S, z, width, mixer.feature_map, tau, rotaries.get(width), finish, x)

        if normed is None:
            return linear
        after = parts.linear(mixer.out, following=block.ffn_norm)

        def within(x: Tensor, rotaries: dict) -> Tensor:
            o = linear(x, rotaries)
            return after(normed(o.unflatten(-1, (mixer.heads, -1))).flatten(-2).to(o.dtype), x)

        return within
    keys, values = state
    if mixer.kind == "window":
        return lambda x, rotaries: attention.window_step(qkv(x), keys, values, position, rotaries.get(width), finish, x)
    if not alone:
        return lambda x, rotaries: attention.softmax_step(qkv(x), keys, values, position, rotaries.get(width), finish, x)
    out = parts.linear(mixer.out, following=block.ffn_norm)
    return lambda x, rotaries: out(attention.softmax_step(qkv(x), keys, values, position, rotaries.get(width), finish, None), x)


def _mamba(model: Any, state: State, parts: Parts) -> Step:
    layers = []
    for i, layer in enumerate(model.layers):
        own = state[f"layers.{i}.conv"], state[f"layers.{i}.ssm"]
        layers.append(_mamba_block(layer.mixer, layer.norm, *own, parts, _next_norm(model, i, "norm")))
    embedding, head = parts.embedding(model), parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        for layer in layers:
            x = layer(x, x)
        return head(x)

    return step


def _mamba_block(
    block: Any, norm: nn.Module | None, conv: Tensor, ssm: Tensor, parts: Parts, following: nn.Module | None
) -> Callable[..., Tensor]:
    """x [B, D] and perhaps what the result is added to → [B, D], of which `following` is a norm."""
    from unisono_torch.kernels.decode import scans

    own = {name: p.detach() for name, p in block.named_parameters()}
    into = parts.linear(block.in_proj, norm, conv=(own["conv1d.weight"], own.get("conv1d.bias"), conv))
    chosen, out, d = parts.linear(block.x_proj), parts.linear(block.out_proj, following=following), ssm.shape[1]

    def step(x: Tensor, residual: Tensor | None = None) -> Tensor:
        uz = into(x)
        return out(scans.mamba_step(uz, chosen(uz[:, :d]), ssm, own), residual)

    return step


def _s4d(model: Any, state: State, parts: Parts) -> Step:
    from unisono_torch.kernels.decode import scans
    from unisono_torch.ops import diagonal_ssm

    def layer(block: Any, h: Tensor, last: nn.Module | None) -> Callable[[Tensor], Tensor]:
        mixer = block.mixer
        names = "log_dt", "log_A_real", "A_imag"
        log_dt, log_A, A_imag = (getattr(mixer, name).detach() for name in names)

        def rates() -> tuple[Tensor, Tensor]:
            return log_dt.double().exp(), torch.stack([-log_A.double().exp(), A_imag.double()], -1)

        power = parts.held(lambda: diagonal_ssm.powers(*rates(), 1)[1].float())
        grown = parts.held(lambda: diagonal_ssm.gain(*rates()).float())
        _, gain, shift, _ = parts.norm(block.mixer_norm)
        assert gain is not None
        assert shift is not None
        rest, after = (mixer.C.detach(), mixer.D.detach()), last if block.ffn is None else block.ffn_norm
        out = parts.linear(mixer.out, act="glu", following=after)
        ffn = None if block.ffn is None else parts.ffn(block.ffn, block.ffn_norm, last)

        def step(x: Tensor) -> Tensor:
            x = out(scans.diagonal_step(x, gain, shift, power, grown, *rest, h), x)
            return x if ffn is None else ffn(x, x)

        return step

    norms = [None] * (len(model.layers) - 1) + [model.norm]  # others are the scan's own
    layers = [layer(block, state[f"layers.{i}.ssm"], norms[i]) for i, block in enumerate(model.layers)]
    embedding, head = parts.embedding(model), parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        for one in layers:
            x = one(x)
        return head(x)

    return step


def _cram(model: Any, state: State, parts: Parts) -> Step | None:
    from unisono_torch.kernels.decode.sums import sum_step

    config, position = model.config, state.get("position")
    if position is None or config.residual == "after" or config.input_norm or config.retains or config.skip:
        return None  # the fixed scheme, whose ξ goes in float32 through all that follows, and variants

    def layer(block: Any, xi: Tensor, last: nn.Module | None) -> Callable[[Tensor], Tensor]:
        score = block.mixer
        Q = parts.held.cast(score.Q, parts.dtype)
        one, two, three = ((a.weight.detach(), a.bias.detach()) for a in score.score)
        up, down = parts.linear(block.ffn.up, block.norm, "gelu_tanh"), parts.linear(block.ffn.down, following=last)
        turns, following = torch.zeros_like(position), parts.following(block.norm)
        how = position, (one, two, three), score.key_scale, xi, config.exclusive, turns, following

        def step(x: Tensor) -> Tensor:
            return down(up(sum_step(x, projected(x, Q, joined=parts.joined), *how)), x)

        return step

    from unisono_torch.kernels.decode.project import projected

    norms = [None] * (len(model.layers) - 1) + [model.norm]
    layers = [layer(block, state[f"layers.{i}.xi"], norms[i]) for i, block in enumerate(model.layers)]
    embedding, head = parts.embedding(model), parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        for one in layers:
            x = one(x)
        position.add_(1)
        return head(x)

    return step


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
        layer(block, state[f"layers.{i}.S"], state[f"layers.{i}.z"], _next_norm(model, i, "mixer_norm"))
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


def _cell(
    p: dict[str, Tensor], parts: Parts, implementation: str, h: Tensor, memory: Tensor, following: nn.Module | None
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """mom_gru.step in three launches: x [B, D] and perhaps a residual → h, on it, of which `following` is a norm; h [2, B, D] and memory
    advance. None where the kernel does not serve."""
    from unisono_torch.ops import mom_gru

    (banks, slots, _), device = p["memory"].shape, memory.device
    if not mom_gru.by_kernel(implementation, device, torch.float32, p):
        return None
    from unisono_torch.kernels.decode.cells import cell_step
    from unisono_torch.ops.mom_gru_loop import Sizes, Weights

    d = p["hidden.weight"].shape[1]
    weights = Weights._make(parts.held(lambda i=i: mom_gru.packed(p, d)[i]) for i in range(len(Weights._fields)))
    sizes, flat, after = Sizes(banks, slots, 1.0), memory.flatten(1, 2), parts.following(following)
    return lambda x, residual: cell_step(x, h, flat, sizes, weights, residual, parts.dtype, parts.joined, after)


def _maru(model: Any, state: State, parts: Parts) -> Step:
    from unisono_torch.ops import mom_gru

    def layer(block: Any, i: int) -> Callable[[Tensor], Tensor]:
        conv, ssm, h, memory = (state[f"layers.{i}.{name}"] for name in ("conv", "ssm", "h", "memory"))
        mamba = _mamba_block(block.mamba, block.mamba_norm, conv, ssm, parts, block.cell_norm)
        project = parts.linear(block.project, block.cell_norm)
        named = {**dict(block.cell.named_parameters()), **dict(block.cell.named_buffers())}
        own = {name: parts.held.cast(p, torch.float32) for name, p in named.items()}
        stacked = block.mamba_norm is not None
        both = torch.stack([h, h])
        state[f"layers.{i}.h"] = h = both[0]
        cell = _cell(own, parts, model.implementation, both, memory, _next_norm(model, i, "mamba_norm"))

        def step(x: Tensor) -> Tensor:
            x = mamba(x, x if stacked else None)
            given = project(x)
            if cell is not None:
                return cell(given, x if stacked else None)
            update, after = mom_gru.step(given, own, (h, memory))
            h.copy_(after[0])
            memory.copy_(after[1])
            return x + update.to(x.dtype) if stacked else update.to(x.dtype)

        return step

    layers = [layer(block, i) for i, block in enumerate(model.layers)]
    embedding = parts.embedding(model)
    below, head = parts.linear(model.head[0], model.norm, "relu"), parts.linear(model.head[1], joined=False)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        for one in layers:
            x = one(x)
        return head(below(x))

    return step


_BUILDERS: dict[str, Callable[[Any, State, Parts], Step | None]] = {
    "lat": _lat,
    "transformer": _lat,
    "mamba": _mamba,
    "s4d": _s4d,
    "cram": _cram,
    "infinityformer": _infinityformer,
    "maru": _maru,
}
