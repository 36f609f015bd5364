"""LAT before the court: linear attention alone, Based's mixture, and hybrids with every flag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import initial_state
from unisono_spec.contract.base import Config
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.lat import LATConfig
from unisono_spec.layers import lat as layer
from unisono_spec.ops.features import feature_map
from unisono_spec.ops.rotary import rotate

from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw, far
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.cases.lat_laws import LAWS
from unisono_conformance.cases.linear_attention import LinearAttention
from unisono_conformance.cases.pairwise import pairwise
from unisono_conformance.cases.window import Window
from unisono_conformance.judging import numerics

# Initial weights are small (N(0, 0.02²), and 0.1 of noise): attention would weigh all tokens alike.
SEEN = ("qkv.weight", "mixer.input.weight", "mixer.out.weight", "conv.weight")
PAST = 4  # tokens that a running sequence has read where their number is limited


def nearly_rotated(x: np.ndarray, *position: Any) -> np.ndarray:
    """RoPE's cos and sin err as a framework's functions do, which what they turn by cancels: each of a pair by the other's size."""
    y = rotate(x, *position)
    first, second = np.split(y, 2, -1)
    across = np.concatenate([-second, first], -1)
    return y + (numerics.perturbation("float32", roundings=numerics.ELEMENTARY)(across) - across)


class LAT(ModelCase):
    name = arch = "lat"
    defaults = ("linear", "based")
    regimes = ("tame", "offset", "large", "empty", "dropout")
    faint = ("empty",)
    laws = LAWS
    inexact = ((layer, "rotate", nearly_rotated),)
    too_narrow: Mapping[str, tuple[str, ...]] = {"large": ("bfloat16",)}
    chunk_size = 16  # heads are so narrow that masks are most of the work

    def __init__(self) -> None:
        small: dict[str, Any] = {"d_model": 4, "head_width": 2, "qk_width": 4, "vocab_size": 7, "ffn_mult": 1, "conv_mult": 1, "window": 3}
        rows = pairwise(FLAGS, lambda row: _accepted(small, row))
        wider = {**small, "d_model": 8, "head_width": 4, "max_positions": 16}
        self.wide: Any = {"wide": LATConfig(**{**small, "d_model": 96, "head_width": 32, "qk_width": 16}, n_layers=1)}
        based: dict[str, Any] = {"feature_map": "taylor2", "positions": "rope", "norm": "rms", "ffn": "swiglu", "bias": False}
        # a dropout rate in the config must not act in evaluation
        self.variants: dict[str, Any] = {
            "linear": LATConfig(**{**small, "qk_width": 3}, n_layers=2, dropout=0.25),
            "based": LATConfig(
                **{**small, **based}, n_layers=3, attention=("conv", "linear", "window"),
                tie_head=True, head_bias=False, head_norm=True, dropout=0.25,
            ),
            **{str(i): LATConfig(**wider, **row, n_layers=len(row["attention"])) for i, row in enumerate(rows)},
        }  # fmt: skip

    def blocks(self, setting: Any) -> LATConfig:
        """What the blocks are made of."""
        return setting

    def bend(self, draw: Draw, params: Arrays) -> Arrays:
        config, out = self.blocks(self.setting(draw)), {}
        for name, p in params.items():
            p = 8 * p if name == "embedding.weight" else 2 * p if name.endswith(SEEN) else p
            if name.endswith("qkv.bias"):
                values, regime = np.arange(len(p)) >= len(p) - config.d_model, draw.regime
                if regime == "offset":  # of v, whose mean the normaliser's gradient cancels
                    p = p + 4.0 * values
                elif regime == "empty" and len(p) == (2 * config.qk_width + config.head_width) * config.n_heads:
                    # φ(q)·φ(k) near ε, where elu(x) + 1 has lost its digits; of relu, most features 0
                    p = p - np.where(values, 0.0, 1.0 if config.feature_map == "relu" else 6.0)
            if name.endswith("mixer.out.weight") and draw.regime == "offset":  # and so of the gradient that reaches v
                p = p + 2.0 * p[:, :1]
            if name == "embedding.weight" and draw.regime == "offset" and config.norm == "rms":  # a LayerNorm would take it away again
                p = p + 2.0
            if name.endswith("norm.weight") and draw.regime == "large":
                p = 4.0 * p
            out[name] = p
        return out

    def fresh_state(self, setting: Config, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        """A cache has room for the past that `random_state` invents, and for the tokens to come."""
        return initial_state(setting, params, batch, length + PAST, dtype)

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        """What random tokens leave behind: as many as `position` says, so that some slots of a cache are still empty."""
        config, random = self.blocks(self.setting(draw)), draw.generator("state")
        position = random.integers(0, PAST + 1, inputs.batch)
        if self.endless(self.setting(draw)):
            position = np.where(random.random(inputs.batch) < 0.5, position, random.integers(PAST, 1000, inputs.batch))
            position = far(position, draw.generator("far"))
        state: Arrays = {"position": position}
        for i, kind in enumerate(config.kinds):
            layer = f"layers.{i}"
            if kind == "conv":
                a = inputs.state[f"{layer}.conv"]
                empty = np.arange(a.shape[1]) < a.shape[1] - position[:, None]
                state[f"{layer}.conv"] = np.where(empty[..., None], 0, random.normal(size=a.shape))
                continue
            length = PAST if kind == "linear" else inputs.state[f"{layer}.k"].shape[1]
            width = config.qk_width if kind == "linear" else config.head_width
            k, v = (random.normal(size=(inputs.batch, length, config.n_heads, w)) for w in (width, config.head_width))
            v = v + 4 * (draw.regime == "offset")
            slot = np.arange(length)
            held = slot < position[:, None] if kind != "window" else slot >= length - position[:, None]
            where = slot + (0 if kind == "softmax" else np.maximum(position[:, None] - length, 0))
            k = rotate(k, where + np.zeros_like(held, int), config.rope_base) if config.positions == "rope" else k
            if kind == "linear":
                k = feature_map(config.feature_map, k, inputs.params.get(f"{layer}.mixer.tau"))
            k, v = (np.where(held[..., None, None], a, 0) for a in (k, v))
            if kind == "linear":
                state |= {f"{layer}.S": np.einsum("bthk,bthv->bhkv", k, v), f"{layer}.z": k.sum(1)}
            else:
                state |= {f"{layer}.k": k, f"{layer}.v": v}
        return {name: state[name].astype(a.dtype) for name, a in inputs.state.items()}

    def reach(self, setting: Any, dtype: str, state: str) -> int | None:
        """Sums and caches forget nothing, nor does what reads them; convolutions and windows see as far as they are wide, added up."""
        config, seen = self.blocks(setting), 0
        for i, kind in enumerate(config.kinds):
            if kind in ("linear", "softmax"):
                return None
            width = config.conv_width - 1 if kind == "conv" else config.window
            if state.startswith(f"layers.{i}."):
                return seen + width
            seen += config.conv_width - 1 if kind == "conv" else config.window - 1
        raise AssertionError(state)

    def endless(self, setting: Any) -> bool:
        config = self.blocks(setting)
        return "softmax" not in config.kinds and config.positions != "learned"


FLAGS = {
    "attention": (("linear", "conv"), ("window", "linear"), ("softmax", "linear")),
    "feature_map": ("elu1", "relu", "taylor2", "learned"),
    "positions": ("none", "learned", "rope"),
    "norm": ("layer", "rms"),
    "ffn": ("gelu", "swiglu"),
    "bias": (True, False),
    "tie_head": (False, True),
    "head_bias": (True, False),
}


def _accepted(small: dict, row: dict) -> bool:
    try:
        LATConfig(**small, **row, n_layers=len(row["attention"]))
    except InputError:
        return False
    return True


CASES = (LinearAttention(), Window(), LAT())
