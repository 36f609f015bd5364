"""LAT and Based: embedding, x ← x + mixer(norm(x)), x ← x + ffn(norm(x)), norm, head; as docs/architectures/lat.md resolves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from unisono_spec.contract import Config, InputError
from unisono_spec.contract.lat import LATConfig

from unisono_jax.layers.lat import STATES, Block, rotated_widths
from unisono_jax.layers.leaves import Arrays, Embedding, Linear, norm, sub
from unisono_jax.layers.reading import Reading, Training
from unisono_jax.models.base import Model, State
from unisono_jax.ops import position, rotary
from unisono_jax.ops.elementwise import wide


class LAT(Model):
    def __init__(self, config: Config, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        self.blocks = blocks = self._blocks()
        self.embedding = Embedding(sub(params, "embedding"))
        if blocks.positions == "learned":
            self.position_embedding = Embedding(sub(params, "position_embedding"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), blocks, kind) for i, kind in enumerate(blocks.kinds)])
        self.norm, self.head = norm(sub(params, "norm")), Linear(sub(params, "head"))

    def _blocks(self) -> LATConfig:
        """What the blocks are made of."""
        assert isinstance(self.config, LATConfig)
        return self.config

    def _read(self, tokens: jax.Array, state: State, read: Reading, training: Training) -> tuple[jax.Array, State]:
        where, count = read.positions(state["position"], tokens)
        x = self._embed(tokens, where)
        rotations = {width: rotary.cos_sin(where, width, self.blocks.rope_base, wide(x)) for width in rotated_widths(self.blocks)}
        out: State = {"position": count}
        for i, (kind, layer) in enumerate(zip(self.blocks.kinds, self.layers, strict=True)):
            names = [f"layers.{i}.{part}" for part in STATES[kind]]
            x, after = layer(x, rotations, state["position"], tuple(state[name] for name in names), read, training.masks(i))
            out |= dict(zip(names, after, strict=True))
        return x, out

    def _embed(self, tokens: jax.Array, where: jax.Array) -> jax.Array:
        x = self.embedding(tokens, self.dtype)
        if self.blocks.positions != "learned":
            return x
        learned = self.position_embedding(jnp.minimum(where, self.blocks.max_positions - 1), wide(x))
        # where values are known, an InputError came before this
        learned = jnp.where((where < self.blocks.max_positions)[..., None], learned, jnp.nan)
        return (x.astype(wide(x)) + learned).astype(x.dtype)

    def _check_reach(self, state: Mapping[str, Any] | None, batch: int, length: int, reset: Any, valid: Any) -> None:
        caches = [i for i, kind in enumerate(self.blocks.kinds) if kind == "softmax"]
        learned = self.blocks.positions == "learned"
        before = jnp.zeros(batch, jnp.int32) if state is None else state["position"]
        if not (learned or (caches and state is not None)) or any(isinstance(a, Tracer) for a in (before, reset, valid)):
            return
        reach = position.furthest(before, length, reset, valid)
        if learned and reach > (most := self.blocks.max_positions):
            raise InputError(f"max_positions: token {reach} of a sequence, {most} positions were learned; use positions='rope'")
        if caches and state is not None and reach > (capacity := state[f"layers.{caches[0]}.k"].shape[1]):
            raise InputError(f"capacity: token {reach} of a sequence, the cache holds {capacity}; give init_state a larger capacity")


MODEL = LAT
