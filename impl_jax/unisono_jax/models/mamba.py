"""Mamba as a stack: embedding, x ← x + mamba(RMSNorm(x)), RMSNorm, head (Gu & Dao 2024, section 3.4)."""

from __future__ import annotations

import jax
from flax import nnx
from unisono_spec.contract.mamba import MambaConfig

from unisono_jax.layers import mamba
from unisono_jax.layers.leaves import Arrays, Embedding, Linear, RMSNorm, sub, updated
from unisono_jax.layers.reading import Mask, Reading, Training
from unisono_jax.models.base import Model, State


class Block(nnx.Module):
    def __init__(self, params: Arrays, norm_eps: float) -> None:
        self.norm, self.mixer = RMSNorm(sub(params, "norm"), norm_eps), mamba.Mamba(sub(params, "mixer"))

    def __call__(self, x: jax.Array, state: mamba.State, read: Reading, mask: Mask) -> tuple[jax.Array, mamba.State]:
        update, after = self.mixer(self.norm(x).astype(x.dtype), state, read)
        return updated(x, update, mask), after


class Mamba(Model):
    config: MambaConfig

    def __init__(self, config: MambaConfig, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(sub(params, "embedding"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), config.norm_eps) for i in range(config.n_layers)])
        self.norm, self.head = RMSNorm(sub(params, "norm"), config.norm_eps), Linear(sub(params, "head"))

    def _read(self, tokens: jax.Array, state: State, read: Reading, training: Training) -> tuple[jax.Array, State]:
        x = self.embedding(tokens, self.dtype)
        out: State = {}
        for i, layer in enumerate(self.layers):
            conv, ssm = f"layers.{i}.conv", f"layers.{i}.ssm"
            x, (out[conv], out[ssm]) = layer(x, (state[conv], state[ssm]), read, training.mask(i))
        return x, out


MODEL = Mamba
