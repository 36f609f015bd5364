"""LAT and Based: embedding, x ← x + mixer(norm(x)), x ← x + ffn(norm(x)), norm, head; as docs/architectures/lat.md resolves them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from unisono_spec.contract import Config, InputError
from unisono_spec.contract.lat import LATConfig

from unisono_torch.arrays import readable
from unisono_torch.layers.basic import Embedding, Head, LayerNorm, RMSNorm
from unisono_torch.layers.lat import Block
from unisono_torch.layers.reading import Reading, Training
from unisono_torch.models.base import Model, State
from unisono_torch.ops import rotary
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.graphs import capturing


class LAT(Model):
    layers: Iterable[Any]  # of Block

    def __init__(self, config: Config, dtype: str = "float32", implementation: str = "auto") -> None:
        super().__init__(config, dtype, implementation)
        blocks = self.blocks = self._blocks()
        d = blocks.d_model
        self.embedding = Embedding(blocks.vocab_size, d)
        self.position_embedding = Embedding(blocks.max_positions, d) if blocks.positions == "learned" else None
        self.layers = nn.ModuleList([Block(blocks, kind) for kind in blocks.kinds])
        self.norm = (RMSNorm if blocks.norm == "rms" else LayerNorm)(d)
        self.head = Head(d, blocks.vocab_size, blocks.head_bias, blocks.tie_head)
        self.turned = {blocks.qk_width if kind == "linear" else blocks.head_width for kind in blocks.kinds if kind != "conv"}
        if blocks.positions != "rope":
            self.turned = set()
        for width in self.turned:
            rotary.prepare(width, blocks.rope_base)

    def _blocks(self) -> LATConfig:
        """What the blocks are made of."""
        assert isinstance(self.config, LATConfig)
        return self.config

    def _read(self, tokens: Tensor, state: State, read: Reading, training: Training) -> tuple[Tensor, State]:
        where, count = read.positions(state["position"], tokens)
        x = self._embed(tokens, where, read)
        rotations = {width: read.rotation(where, width, self.blocks.rope_base, wide(x.dtype)) for width in self.turned}
        out: State = {"position": count}
        for i, layer in enumerate(self.layers):
            names = [f"layers.{i}.{part}" for part in layer.states]
            x, after = layer(x, rotations, state["position"], tuple(state[name] for name in names), read, training.masks(i))
            out |= dict(zip(names, after, strict=True))
        return x, out

    def _embed(self, tokens: Tensor, where: Tensor, read: Reading) -> Tensor:
        x, valid = self.embedding(tokens).to(read.dtype), read.marks.valid
        if self.position_embedding is None:
            return x
        most = self.blocks.max_positions
        if where.numel() and readable(where) and not capturing(where):
            last = (where if valid is None else torch.where(valid, where, 0)).max().item()
            if last >= most:
                raise InputError(f"max_positions: token {last + 1} of a sequence, {most} positions were learned; use positions='rope'")
        return x + self.position_embedding(where.clamp(max=most - 1)).to(x.dtype)


MODEL = LAT
