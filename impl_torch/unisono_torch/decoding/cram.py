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


def cram(model: Any, state: State, parts: Parts) -> Step:
    return _fixed(model, state["xi"], parts) if model.config.scheme == "fixed" else _adaptive(model, state, parts)


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

    config, position, after = model.config, state["position"], model.config.residual == "after"
    full = _in_full(model, parts) if after else parts
    layers, norms = list(model.layers), [layer.norm for layer in model.layers]

    def layer(i: int, block: Any, last: nn.Module | None) -> Callable[[Tensor], Tensor]:
        score, before = block.mixer, norms[i - 1] if after and i else None
        given = block.input_norm or before or score
        ask = parts.linear(SimpleNamespace(weight=score.Q, bias=None), given)
        one, two, three = ((a.weight.detach(), a.bias.detach()) for a in score.score)
        counters = torch.zeros((len(position), 3), dtype=torch.int32, device=position.device)
        if config.skip:  # what is added to a norm is no part of the product that reads it
            parts.nexts[block.norm] = Next(parts.norm(block.norm), parts.batch, position.device)
        up, down = full.linear(block.ffn.up, None if after else block.norm, "gelu_tanh"), full.linear(block.ffn.down, following=last)
        following = None if after else parts.nexts[block.norm] if config.skip else parts.following(block.norm)
        decay = None if score.decay is None else score.decay.detach()
        fade, rest = (None if decay is None else parts.held(lambda a=decay, by=by: sigmoid(by * a.float())) for by in (1, -1))
        sums = state[f"layers.{i}.xi"], state[f"layers.{i}.z"] if config.normalised else None
        own = Sum(
            (one, two, three), score.key_scale, *sums, fade, rest, config.exclusive, config.channel_weights, config.skip, parts.norm(given)
        )

        def step(x: Tensor) -> Tensor:
            if block.input_norm is not None and before is not None:
                x = parts.normed(x, before)
            xi = sum_step(x, ask(x), position, own, counters, following)
            return down(up(xi), xi if after else x)

        return step

    if after:
        asking = [None for _ in layers]
    elif config.input_norm:
        asking = [*(block.input_norm for block in layers[1:]), model.norm]
    else:
        asking = [*(block.mixer if parts.joined == "fronts" else None for block in layers[1:]), model.norm]
    steps = [layer(i, block, asking[i]) for i, block in enumerate(layers)]
    embedding, head = parts.embedding(model), parts.head(model)

    def step(token: Tensor) -> Tensor:
        x = embedding(token)
        for one in steps:
            x = one(x)
        position.add_(1)
        return head(parts.normed(x, norms[-1]) if after else x)

    return step


def _in_full(model: Any, parts: Parts) -> Parts:
    """Parts of what goes on in float32, as a model in it would have them."""
    from unisono_torch.kernels.decode.project import MOST

    full = Parts(model, parts.held, parts.batch)
    full.dtype, full.joined = torch.float32, "" if parts.batch <= MOST else "fronts"
    return full
