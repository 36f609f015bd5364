"""Steps of Mamba, S4D and MARU in few launches (fused.py)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unisono_torch.decoding.parts import Parts, next_norm

if TYPE_CHECKING:
    from unisono_torch.models.base import State

Step = Callable[[Tensor], Tensor]  # token [B] → logits [B, V]


def mamba(model: Any, state: State, parts: Parts) -> Step:
    layers = []
    for i, layer in enumerate(model.layers):
        own = state[f"layers.{i}.conv"], state[f"layers.{i}.ssm"]
        layers.append(_mamba_block(layer.mixer, layer.norm, *own, parts, next_norm(model, i, "norm")))
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
    from unisono_torch.kernels.decode import project, scans

    own = {name: p.detach() for name, p in block.named_parameters()}
    if not parts.joined and parts.batch > project.MOST and following is not None:
        return _mamba_of_many(block, norm, conv, ssm, own, parts, following)
    into = parts.linear(block.in_proj, norm, conv=(own["conv1d.weight"], own.get("conv1d.bias"), conv))
    chosen, out, d = parts.linear(block.x_proj), parts.linear(block.out_proj, following=following), ssm.shape[1]

    def step(x: Tensor, residual: Tensor | None = None) -> Tensor:
        uz = into(x)
        return out(scans.mamba_step(uz, chosen(uz[:, :d]), ssm, own), residual)

    return step


def _mamba_of_many(
    block: Any, norm: nn.Module | None, conv: Tensor, ssm: Tensor, own: dict[str, Tensor], parts: Parts, following: nn.Module
) -> Callable[..., Tensor]:
    """`_mamba_block` between a library's products, in one launch; the norm's makes its counters 0 again."""
    from unisono_torch.kernels.decode import scans

    into, out = parts.linear(block.in_proj, norm), parts.linear(block.out_proj, following=following)
    chosen, counters = parts.held.cast(own["x_proj.weight"], parts.dtype), torch.zeros(2, dtype=torch.int32, device=ssm.device)
    parts.nexts[following].spent = counters

    def step(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return out(scans.whole_step(into(x), conv, chosen, counters, ssm, own), residual)

    return step


def s4d(model: Any, state: State, parts: Parts) -> Step:
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


def _cell(
    p: dict[str, Tensor], parts: Parts, implementation: str, h: Tensor, memory: Tensor
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """mom_gru.step of products of x [B, ·] and perhaps a residual → h, on it; h [2, B, D] and memory advance. None where no kernel
    serves."""
    from unisono_torch.ops import mom_gru

    (banks, slots, _), device = p["memory"].shape, memory.device
    if not mom_gru.by_kernel(implementation, device, torch.float32, p):
        return None
    from unisono_torch.kernels.mom_gru.operator import Room, advance
    from unisono_torch.ops.mom_gru_loop import Sizes, Weights

    d = p["hidden.weight"].shape[1]
    weights = Weights._make(parts.held(lambda i=i: mom_gru.packed(p, d)[i]) for i in range(len(Weights._fields)))
    sizes, flat, room = Sizes(banks, slots, 1.0), memory.flatten(1, 2), Room(device)
    return lambda given, residual: advance(h, flat, given, sizes, weights, residual, parts.dtype, room)


def _given(block: Any, p: dict[str, Tensor], stacked: bool, parts: Parts) -> SimpleNamespace:
    """The cell's products of x as one map of what the Mamba block makes; or of what its last product does, where a norm comes between."""
    from unisono_torch.ops import mom_gru

    def made(i: int) -> Tensor:
        first, bias, d = *mom_gru.packed(p, p["hidden.weight"].shape[1])[:2], p["hidden.weight"].shape[1]
        assert first.shape[1] == d
        for layer in (block.project,) if stacked else (block.project, block.mamba.out_proj):
            if i == 1 and layer.bias is not None:
                bias = torch.addmv(bias, first, layer.bias.detach().float())
            first = first @ layer.weight.detach().float()
        return (first, bias)[i]

    return SimpleNamespace(weight=parts.held(lambda: made(0)), bias=parts.held(lambda: made(1)))


def maru(model: Any, state: State, parts: Parts) -> Step:
    from unisono_torch.kernels.decode import scans
    from unisono_torch.ops import mom_gru

    def layer(block: Any, i: int) -> Callable[[Tensor], Tensor]:
        conv, ssm, h, memory = (state[f"layers.{i}.{name}"] for name in ("conv", "ssm", "h", "memory"))
        named = {**dict(block.cell.named_parameters()), **dict(block.cell.named_buffers())}
        own = {name: parts.held.cast(p, torch.float32) for name, p in named.items()}
        stacked = block.mamba_norm is not None
        both = torch.stack([h, h])
        state[f"layers.{i}.h"] = h = both[0]
        cell = _cell(own, parts, model.implementation, both, memory)
        if cell is None:
            mamba = _mamba_block(block.mamba, block.mamba_norm, conv, ssm, parts, block.cell_norm)
            project = parts.linear(block.project, block.cell_norm)

            def plain(x: Tensor) -> Tensor:
                x = mamba(x, x if stacked else None)
                update, after = mom_gru.step(project(x), own, (h, memory))
                h.copy_(after[0])
                memory.copy_(after[1])
                return x + update.to(x.dtype) if stacked else update.to(x.dtype)

            return plain
        p = {name: a.detach() for name, a in block.mamba.named_parameters()}
        into = parts.linear(block.mamba.in_proj, block.mamba_norm, conv=(p["conv1d.weight"], p.get("conv1d.bias"), conv))
        chosen, given = parts.held.cast(p["x_proj.weight"], parts.dtype), _given(block, own, stacked, parts)
        counters = torch.zeros(2, dtype=torch.int32, device=h.device)
        apart = stacked or parts.joined  # of many sequences float32's product takes longer beside programs that it waits for
        if stacked:
            finish = parts.finish(block.mamba.out_proj, 0, following=block.cell_norm)
        else:
            finish = parts.finish(given, 0, bool(parts.joined), dtype=torch.float32)
        asked = parts.linear(given, block.cell_norm, dtype=torch.float32) if apart else None

        def step(x: Tensor) -> Tensor:
            uz = into(x)
            x = scans.block_step(uz, chosen, counters, ssm, p, finish, x if stacked else None)
            return cell(x if asked is None else asked(x), x if stacked else None)

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
