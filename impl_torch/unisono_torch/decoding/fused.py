"""Steps of models in few launches: each layer's norms, products and activations in one, its op in place of the state before it.

What is not here is read by `Model.step`'s own operations, in the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from unisono_spec.contract.base import ANY

from unisono_torch.kernels.registry import available
from unisono_torch.layers.basic import LayerNorm, Linear, RMSNorm
from unisono_torch.layers.ffn import FFN, GELUFFN, GatedGELU, SwiGLU
from unisono_torch.ops import rotary

if TYPE_CHECKING:
    from unisono_torch.models.base import Model, State

Step = Callable[[Tensor], Tensor]  # token [B] → logits [B, V]
MOST_WINDOW = 128  # keys that a program holds at once


class Held:
    """Tensors that are functions of parameters: made once, and filled anew by `refresh`, since parameters may have been trained."""

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def __call__(self, make: Callable[[], Tensor]) -> Tensor:
        found = make().clone()
        self._made.append((found, make))
        return found

    def cast(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """`p` itself where it has the dtype."""
        p = p.detach()
        return p if p.dtype == dtype and p.is_contiguous() else self(lambda: p.to(dtype).contiguous())

    def refresh(self) -> None:
        for held, make in self._made:
            held.copy_(make())


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
    step = build(model, own, _Parts(model, held))
    return None if step is None else (own, step)


class _Parts:
    """What steps are made of, in the model's compute dtype."""

    def __init__(self, model: Model, held: Held) -> None:
        self.dtype, self.held = model.compute_dtype, held

    def norm(self, norm: nn.Module | None) -> tuple[str, Tensor | None, Tensor | None]:
        if norm is None:
            return "none", None, None
        assert isinstance(norm, RMSNorm | LayerNorm)
        weight = norm.weight.detach()
        return ("rms", weight, None) if isinstance(norm, RMSNorm) else ("layer", weight, norm.bias.detach())

    def linear(
        self, layer: Linear | Any, norm: nn.Module | None = None, act: str = "none", weight: Tensor | None = None
    ) -> Callable[..., Tensor]:
        """x [B, in] and perhaps a residual → [B, out]. With "gated_gelu" and "glu", the two halves of the rows are the two products."""
        from unisono_torch.kernels.decode.project import projected

        before = self.norm(norm)
        w = self.held.cast(layer.weight if weight is None else weight, self.dtype)
        b = None if layer.bias is None else layer.bias.detach()
        if act in ("gated_gelu", "glu"):
            (w, w2), (b, b2) = w.chunk(2), (None, None) if b is None else b.chunk(2)
        else:
            w2 = b2 = None
        return lambda x, residual=None: projected(x, w, b, second=w2, second_bias=b2, norm=before, act=act, residual=residual)

    def ffn(self, ffn: nn.Module, norm: nn.Module | None) -> Callable[[Tensor, Tensor], Tensor]:
        """x [B, D] and what the result is added to → [B, D]."""
        from unisono_torch.kernels.decode.project import projected

        if isinstance(ffn, SwiGLU):
            before, gate, up = self.norm(norm), *(self.held.cast(a.weight, self.dtype) for a in (ffn.gate, ffn.up))
            bias = [None if a.bias is None else a.bias.detach() for a in (ffn.gate, ffn.up)]

            def rise(x: Tensor) -> Tensor:
                return projected(x, gate, bias[0], second=up, second_bias=bias[1], norm=before, act="swiglu")
        else:
            kinds = {GELUFFN: "gelu", FFN: "gelu_tanh", GatedGELU: "gated_gelu"}
            rise = self.linear(ffn.up, norm, kinds[type(ffn)])
        down = self.linear(ffn.down)
        return lambda x, residual: down(rise(x), residual)

    def embedding(self, model: Any) -> Callable[[Tensor], Tensor]:
        weight, dtype = model.embedding.weight.detach(), self.dtype
        return lambda token: nn.functional.embedding(token, weight).to(dtype)

    def head(self, model: Any) -> Callable[[Tensor], Tensor]:
        return self.linear(model.head, model.norm, weight=model.embedding.weight if model.config.tie_head else None)


def _lat(model: Any, state: State, parts: _Parts) -> Step | None:
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
        names = [f"layers.{i}.{part}" for part in block.states]
        layers.append((_mixer(block, [state[name] for name in names], position, parts), parts.ffn(block.ffn, block.ffn_norm)))
    embedding, head = parts.embedding(model), parts.head(model)
    learned = None if model.position_embedding is None else model.position_embedding.weight.detach()

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        if learned is not None:
            x = x + nn.functional.embedding(position, learned).to(x.dtype)
        turns = {width: attention.turns(position, table) for width, table in tables.items()}
        for mixer, ffn in layers:
            x = mixer(x, turns)
            x = ffn(x, x)
        position.add_(1)
        return head(x)

    return step


def _mixer(block: Any, state: Sequence[Tensor], position: Tensor, parts: _Parts) -> Callable[[Tensor, dict], Tensor]:
    """x [B, D] and the rotations by width → x and what the mixer adds to it."""
    from unisono_torch.kernels.decode import attention, scans

    mixer = block.mixer
    out = parts.linear(mixer.out)
    if block.states == ("conv",):
        into, weight = parts.linear(mixer.input, block.mixer_norm), mixer.conv.weight.detach()
        bias = None if mixer.conv.bias is None else mixer.conv.bias.detach()
        return lambda x, turns: out(scans.conv_step(into(x), state[0], weight, bias), x)
    qkv, width = parts.linear(mixer.qkv, block.mixer_norm), mixer.width
    if mixer.kind == "linear":
        tau = None if mixer.tau is None else mixer.tau.detach()
        S, z = state
        return lambda x, turns: out(attention.linear_step(qkv(x), S, z, width, mixer.feature_map, tau, turns.get(width)), x)
    op, (keys, values) = attention.window_step if mixer.kind == "window" else attention.softmax_step, state
    return lambda x, turns: out(op(qkv(x), keys, values, position, turns.get(width)), x)


def _mamba(model: Any, state: State, parts: _Parts) -> Step:
    layers = []
    for i, layer in enumerate(model.layers):
        layers.append(_mamba_block(layer.mixer, layer.norm, state[f"layers.{i}.conv"], state[f"layers.{i}.ssm"], parts))
    embedding, head = parts.embedding(model), parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        for layer in layers:
            x = layer(x, x)
        return head(x)

    return step


def _mamba_block(block: Any, norm: nn.Module | None, conv: Tensor, ssm: Tensor, parts: _Parts) -> Callable[[Tensor, Tensor], Tensor]:
    """x [B, D] and what the result is added to → [B, D]."""
    from unisono_torch.kernels.decode import scans

    into, out = parts.linear(block.in_proj, norm), parts.linear(block.out_proj)
    own = {name: p.detach() for name, p in block.named_parameters()}
    x_proj = parts.held.cast(block.x_proj.weight, parts.dtype)
    return lambda x, residual: out(scans.mamba_step(into(x), conv, ssm, own, x_proj), residual)


def _s4d(model: Any, state: State, parts: _Parts) -> Step:
    from unisono_torch.kernels.decode import scans
    from unisono_torch.ops import diagonal_ssm

    def layer(block: Any, h: Tensor) -> Callable[[Tensor], Tensor]:
        mixer = block.mixer
        names = "log_dt", "log_A_real", "A_imag"
        log_dt, log_A, turn = (getattr(mixer, name).detach() for name in names)

        def rates() -> tuple[Tensor, Tensor]:
            return log_dt.double().exp(), torch.stack([-log_A.double().exp(), turn.double()], -1)

        power = parts.held(lambda: diagonal_ssm.powers(*rates(), 1)[1].float())
        grown = parts.held(lambda: diagonal_ssm.gain(*rates()).float())
        _, gain, shift = parts.norm(block.mixer_norm)
        assert gain is not None
        assert shift is not None
        rest, out = (mixer.C.detach(), mixer.D.detach()), parts.linear(mixer.out, act="glu")
        ffn = None if block.ffn is None else parts.ffn(block.ffn, block.ffn_norm)

        def step(x: Tensor) -> Tensor:
            x = out(scans.diagonal_step(x, gain, shift, power, grown, *rest, h), x)
            return x if ffn is None else ffn(x, x)

        return step

    layers = [layer(block, state[f"layers.{i}.ssm"]) for i, block in enumerate(model.layers)]
    embedding, head = parts.embedding(model), parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        for one in layers:
            x = one(x)
        return head(x)

    return step


_BUILDERS: dict[str, Callable[[Any, State, _Parts], Step | None]] = {"lat": _lat, "transformer": _lat, "mamba": _mamba, "s4d": _s4d}
