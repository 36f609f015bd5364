"""Steps of both of CRAM's schemes in few launches (fused.py)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unisono_torch.decoding.parts import Parts, next_norm
from unisono_torch.decoding.recurrent import Step
from unisono_torch.ops.elementwise import sigmoid

if TYPE_CHECKING:
    from unisono_torch.models.base import State


def cram(model: Any, state: State, parts: Parts) -> Step | None:
    config = model.config
    if config.scheme == "fixed":
        return _fixed(model, state["xi"], parts)
    return None if config.residual == "after" else _adaptive(model, state, parts)  # whose layers are in float32


def _fixed(model: Any, xi: Tensor, parts: Parts) -> Step:
    from unisono_torch.kernels.decode.sums import code_step

    table = model.embedding.weight.detach() if model.config.codes == "embedding" else None
    into = model.input.weight.detach(), model.input.bias.detach()
    turns = torch.zeros(len(xi), dtype=torch.int32, device=xi.device)
    layers = [parts.ffn(layer.ffn, layer.norm, next_norm(model, i, "norm")) for i, layer in enumerate(model.layers)]
    head = parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = code_step(token.contiguous(), table, xi, into, model.config.decay, parts.dtype, turns)
        for layer in layers:
            x = layer(x, x)
        return head(x)

    return step


def _adaptive(model: Any, state: State, parts: Parts) -> Step:
    from unisono_torch.kernels.decode.sums import Sum, sum_step
    from unisono_torch.kernels.decode.tiles import Next

    config, position = model.config, state["position"]

    def layer(i: int, block: Any, last: nn.Module | None) -> Callable[[Tensor], Tensor]:
        score = block.mixer
        given = score if block.input_norm is None else block.input_norm
        ask = parts.linear(SimpleNamespace(weight=score.Q, bias=None), given)
        one, two, three = ((a.weight.detach(), a.bias.detach()) for a in score.score)
        counters = torch.zeros((len(position), 3), dtype=torch.int32, device=position.device)
        if config.skip:  # what is added to a norm is no part of the product that reads it
            parts.nexts[block.norm] = Next(parts.norm(block.norm), parts.batch, position.device)
        up, down = parts.linear(block.ffn.up, block.norm, "gelu_tanh"), parts.linear(block.ffn.down, following=last)
        following = parts.nexts[block.norm] if config.skip else parts.following(block.norm)
        decay = None if score.decay is None else score.decay.detach()
        fade, rest = (None if decay is None else parts.held(lambda a=decay, by=by: sigmoid(by * a.float())) for by in (1, -1))
        sums = state[f"layers.{i}.xi"], state[f"layers.{i}.z"] if config.normalised else None
        channels, norm = config.channel_weights, parts.norm(given)
        own = Sum((one, two, three), score.key_scale, *sums, fade, rest, config.exclusive, channels, config.skip, norm)

        def step(x: Tensor) -> Tensor:
            return down(up(sum_step(x, ask(x), position, own, counters, following)), x)

        return step

    if model.layers[0].input_norm is not None:
        asking = [block.input_norm for block in model.layers[1:]]
    else:
        asking = [block.mixer if parts.joined == "fronts" else None for block in model.layers[1:]]
    norms = [*asking, model.norm]
    layers = [layer(i, block, norms[i]) for i, block in enumerate(model.layers)]
    embedding, head = parts.embedding(model), parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        for one in layers:
            x = one(x)
        position.add_(1)
        return head(x)

    return step
