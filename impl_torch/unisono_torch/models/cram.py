"""CRAM, both schemes (Muraleedharan, sections 3.1 and 3.2), as docs/architectures/cram.md resolves them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from unisono_spec.contract.checks import check_code
from unisono_spec.contract.cram import CRAMConfig

from unisono_torch.layers.basic import Embedding, Head, LayerNorm, Linear
from unisono_torch.layers.cram import Block, Readout
from unisono_torch.layers.reading import Reading, Training
from unisono_torch.models.base import Model, State
from unisono_torch.ops import decayed_sum
from unisono_torch.ops.elementwise import binary_digits
from unisono_torch.ops.precision import exact


class CRAM(Model):
    config: CRAMConfig
    layers: Iterable[Any]  # of Readout or of Block

    def __init__(self, config: CRAMConfig, dtype: str = "float32", implementation: str = "auto") -> None:
        super().__init__(config, dtype, implementation)
        d = config.d_model
        self.embedding = Embedding(config.vocab_size, d) if config.has_embedding else None
        self.input = Linear(config.code_size, d) if config.scheme == "fixed" else None
        layer = Readout if config.scheme == "fixed" else Block
        self.layers = nn.ModuleList([layer(config) for _ in range(config.n_layers)])
        self.norm = LayerNorm(d)
        self.head = Head(d, config.output_size, config.head_bias, config.tie_head)

    def code(self, tokens: Tensor) -> Tensor:
        """What the fixed scheme sums, before σ: tokens [...] → x [..., code]."""
        check_code(self.config, tokens=tokens, array=Tensor)
        return self._code(tokens, self.compute_dtype)

    def _code(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        if self.config.codes == "binary":
            return binary_digits(tokens, self.config.code_bits, dtype)
        return self._embed(tokens, dtype) if self.config.codes == "embedding" else tokens.to(dtype)

    def readout(self, xi: Tensor, dropout: Sequence[Tensor] | None = None) -> Tensor:
        """f_θ of the fixed scheme (eq 6): ξ [..., code] → logits [..., V]. No mixing over time."""
        check_code(self.config, xi=xi, dropout=dropout, array=Tensor)
        return self._read_out_to_head(xi, self._dropout(xi.shape[:-1], dropout), self.compute_dtype)

    @exact
    def _read_out_to_head(self, xi: Tensor, dropout: Sequence[Tensor] | None, dtype: torch.dtype) -> Tensor:
        return self._head(self._below(xi, dropout, dtype))

    def readout_nats(self, xi: Tensor, targets: Tensor, dropout: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """`nats` of `readout`'s logits: ξ [..., code], targets [...] → their sum, nats [...] without a gradient."""
        check_code(self.config, xi=xi, dropout=dropout, array=Tensor)
        self._check_targets(targets, xi.shape[:-1])
        return self._read_out_to_nats(xi, targets, self._dropout(xi.shape[:-1], dropout), self.compute_dtype)

    @exact
    def _read_out_to_nats(self, xi: Tensor, targets: Tensor, dropout: Sequence[Tensor] | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._nats(self._below(xi, dropout, dtype), targets)

    def _below(self, xi: Tensor, dropout: Sequence[Tensor] | None, dtype: torch.dtype) -> Tensor:
        """What the head is given."""
        assert self.input is not None
        x = self.input(xi).to(dtype)  # in ξ's dtype: its low digits are the tokens further back
        for i, layer in enumerate(self.layers):
            x = layer(x, None if dropout is None else dropout[i])
        return x

    def _read(self, tokens: Tensor, state: State, read: Reading, training: Training) -> tuple[Tensor, State]:
        if self.config.scheme == "fixed":
            xi, last = read(decayed_sum, self._code(tokens, read.dtype), self.config.decay, state["xi"])
            return self._below(xi, training.dropout, read.dtype), {"xi": last}
        x = self._embed(tokens, read.dtype)
        where, count = read.positions(state["position"], tokens)
        out: State = {"position": count}
        for i, layer in enumerate(self.layers):
            names = [f"layers.{i}.{name}" for name in self.config.sums]
            u, s = layer.scored_input(x, where)
            xi, *sums = layer.mixer.summed(u, s, [state[name] for name in names], read)
            out |= zip(names, sums, strict=True)
            x = layer(x, u, xi, training.mask(i))
        return x, out

    def _embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.embedding is not None
        return self.embedding(tokens).to(dtype)


MODEL = CRAM
