"""MARU's layer: a Mamba block, a Linear map and the MoM-GRU cell; with prenorm=True, norms before and residuals around both."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from unisono_spec.contract.maru import MARUConfig

from unisono_torch.layers.basic import Linear, RMSNorm, updated
from unisono_torch.layers.mamba import MambaBlock
from unisono_torch.layers.reading import Marks, Mask, Reading
from unisono_torch.ops import mom_gru

State = tuple[Tensor, ...]  # conv, ssm, h, memory


class Cell(nn.Module):
    """x [B, (T,) D] → h, the same shape: the parameters of ops/mom_gru.py, and the call of it."""

    def __init__(self, config: MARUConfig) -> None:
        super().__init__()
        d, m, n = config.d_model, config.d_memory, config.n_banks
        self.temperature = config.temperature
        self.memory = nn.Parameter(torch.empty(n, config.n_slots, m))
        self.router = nn.ModuleList([Linear(2 * d, config.router_hidden), Linear(config.router_hidden, n)])
        self.query = Linear(2 * d, m)
        self.input = Linear(d + m, 3 * d)
        self.hidden = Linear(d, 3 * d, bias=False)
        self.key, self.value = Linear(d, m), Linear(d, m)
        self.erase = Linear(d, m) if config.erase == "separate" else None
        self.gate = Linear(d, 1)
        if config.router == "gumbel":  # training's balancing rule moves them
            self.register_buffer("balance_bias", torch.empty(n))
            self.register_buffer("balance_load", torch.empty(n))

    def _named(self) -> dict[str, Tensor]:
        """What the op reads, by its names: a weight that is pruned or parametrised, as it is computed now."""
        layers = [(name, part) for name, part in self.named_modules() if isinstance(part, Linear)]
        weights = {f"{name}.weight": part.weight for name, part in layers}
        biases = {f"{name}.bias": part.bias for name, part in layers if part.bias is not None}
        return {"memory": self.memory, **weights, **biases, **dict(self.named_buffers(recurse=False))}

    def forward(self, x: Tensor, state: State, read: Reading, noise: Mask) -> tuple[Tensor, State]:
        """x [B, D] or [B, T, D], noise [B, (T,) n] or None → h, float32 or wider, and the state (h, memory) after it."""
        p = self._named()
        return read(mom_gru, x, p, state, noise=noise, temperature=self.temperature)

    @torch.no_grad()
    def load(self, x: Tensor, before: Tensor, h: Tensor, marks: Marks, noise: Mask) -> Tensor:
        """The mean share of each bank [n] over the valid tokens of x [B, T, D]; before [B, D] and h [B, T, D]: as `forward` knows them."""
        reset, valid = marks
        h = torch.cat([before[:, None], h[:, :-1].to(before.dtype)], 1)
        h = h if reset is None else torch.where(reset[..., None], 0, h)
        p = self._named()
        rho = mom_gru.routing(x.to(h.dtype), h, p, noise, self.temperature)
        if valid is None:
            return rho.flatten(0, 1).mean(0)
        # a selection by `valid` would wait for the device
        return torch.where(valid[..., None], rho, 0).sum((0, 1)) / valid.sum().clamp(min=1)


class Layer(nn.Module):
    def __init__(self, config: MARUConfig) -> None:
        super().__init__()
        d = config.d_model
        self.mamba_norm = RMSNorm(d) if config.prenorm else None
        self.mamba = MambaBlock(d, config.expand, config.d_state, config.conv_width, config.rank, bias=True, conv_bias=True)
        self.cell_norm = RMSNorm(d) if config.prenorm else None
        self.project = Linear(d, d)
        self.cell = Cell(config)

    def forward(
        self,
        x: Tensor,
        state: State,
        read: Reading,
        masks: tuple[Mask, ...],
        noise: Mask,
        loads: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """x [B, D] or [B, T, D] → the same, the state after it. masks: dropout's, of block and cell. loads: receives the cell's load."""
        conv, ssm, h, memory = state
        update, (conv, ssm) = self.mamba(_before(self.mamba_norm, x), (conv, ssm), read)
        x = _after(self.mamba_norm, x, update, masks[0])
        y, before = self.project(_before(self.cell_norm, x)), h
        update, (h, memory) = self.cell(y, (h, memory), read, noise)
        if loads is not None and noise is not None:
            loads.append(self.cell.load(y, before, update, read.marks, noise))
        return _after(self.cell_norm, x, update.to(x.dtype), masks[1]), (conv, ssm, h, memory)


def _before(norm: RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x).to(x.dtype)


def _after(norm: RMSNorm | None, x: Tensor, update: Tensor, mask: Mask) -> Tensor:
    if norm is not None:
        return updated(x, update, mask)
    return update if mask is None else update * mask.to(update.dtype)
