"""InfinityFormer before the court."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.layers import infinityformer as layer
from unisono_spec.ops import multiscale
from unisono_spec.ops.features import feature_map
from unisono_spec.ops.multiscale import compressed
from unisono_spec.ops.rotary import rotate

from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw, far
from unisono_conformance.cases.infinityformer_laws import LAWS
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.cases.lat import nearly_rotated
from unisono_conformance.cases.multiscale import MultiScale
from unisono_conformance.cases.pairwise import pairwise
from unisono_conformance.judging import numerics

PAST = 12  # tokens that a running sequence has read


def nearly_compressed(S: np.ndarray, rank: int) -> np.ndarray:
    """A computed decomposition of S [..., K, V] is exact for some S + E with ‖E‖ ≤ p(K) u ‖S‖ (LAPACK Users' Guide, section 4.9): here
    each element of E is at most u ‖S‖, and so p(K) = K. What becomes of E is S's own affair: the projector turns by E over the
    distance of the singular values that it parts. (NumPy decomposes float32 in float64, so that realisations would not err here.)"""
    random = np.random.Generator(np.random.Philox(zlib.crc32(S.tobytes())))
    size = np.sqrt((np.real(S) ** 2).sum((-1, -2), keepdims=True))
    E = numerics.U["float32"] * size * random.uniform(-1, 1, S.shape)
    return compressed((S + E).astype(S.dtype), rank)


READ = 3  # roundings of what one scale reads: of its numerator, its denominator, and their quotient


def nearly_decayed(op: Callable[..., Any]) -> Callable[..., Any]:
    """λ errs by its own last digits however near 1 it is, which an error of what it is made of does not show: λ (1 + δ) is e^(log λ + δ).
    Of like decays alike: δ adds up over all tokens that a learned one stands at. λ = 1 of the context path is exact.

    And what each scale reads is rounded (READ) before the scales are summed, c (1 + δ) r: where they read nearly the same, as after decays
    near 0, the gradient of the shares is a difference of reads.
    """

    def run(q: Any, k: Any, v: Any, q_norm: Any, k_norm: Any, log_decay: np.ndarray, weight: np.ndarray, *more: Any, **named: Any) -> Any:
        error = np.where(log_decay == 0, 0, numerics.alike(log_decay, numerics.ELEMENTARY))
        shares = weight * (1 + numerics.alike(weight * np.expand_dims(v, -3), READ))  # [B, (T,) M, H, V]
        decays = (log_decay + error).astype(log_decay.dtype)
        return op(q, k, v, q_norm, k_norm, decays, shares.astype(weight.dtype), *more, **named)

    return run


class InfinityFormer(ModelCase):
    name = arch = "infinityformer"
    defaults = ("learned", "data")
    regimes = ("tame", "near_one", "forgetting", "saturated", "offset", "large", "faint", "dropout")
    faint = ("faint",)
    laws = LAWS
    inexact = (
        (multiscale, "compressed", nearly_compressed),
        (layer, "rotate", nearly_rotated),
        *((multiscale, form, nearly_decayed(getattr(multiscale, form))) for form in ("step", "parallel")),
    )
    too_narrow: Mapping[str, tuple[str, ...]] = {"saturated": ("bfloat16",)}

    def __init__(self) -> None:
        small: dict[str, Any] = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ffn": 4, "vocab_size": 7}
        self.wide = {"wide": InfinityFormerConfig(**{**small, "d_model": 96, "n_heads": 3, "d_ffn": 32})}
        # a dropout rate in the config must not act in evaluation
        self.variants = {
            "learned": InfinityFormerConfig(**small, dropout=0.25),
            "data": InfinityFormerConfig(
                **{**small, "n_layers": 2}, decay="data", gate="vector", rope="numerator", tie_head=False, head_bias=True, dropout=0.25
            ),
            # a best approximation is a function of S, and has a derivative, where S has that rank and its singular values lie apart:
            # of a ReLU map after a reset it has not
            "compressed": InfinityFormerConfig(**small, compress_every=3, compress_rank=2),
            **{str(i): InfinityFormerConfig(**{**small, **row}) for i, row in enumerate(pairwise(FIELDS, _accepted))},
        }

    def bend(self, draw: Draw, params: Arrays) -> Arrays:
        out, width = dict(params), len(params["norm.weight"])
        for name, p in params.items():
            if name.endswith("decay.bias") and draw.regime == "near_one":
                out[name] = p + 5.0
            if name.endswith("decay.bias") and draw.regime == "forgetting":
                out[name] = 0.1 * p - 7.0
            if name.endswith("gate.weight") and draw.regime == "saturated":
                out[name] = 100.0 * p
            if name.endswith("qkv.bias") and draw.regime == "offset":  # of v, whose mean the normaliser's gradient cancels
                out[name] = np.concatenate([p[: 2 * width], p[2 * width :] + 4.0])
            if name.endswith("qkv.bias") and draw.regime == "faint":  # φ(q)·φ(k) near ε where RoPE has not turned them; of relu, mostly 0
                shift = 1.0 if self.setting(draw).feature_map == "relu" else 6.0
                out[name] = np.concatenate([p[: 2 * width] - shift, p[2 * width :]])
            if name.endswith("mixer.out.weight") and draw.regime == "offset":  # and so of the gradient that reaches v
                out[name] = p + 2.0 * p[:, :1]
            if name.endswith("norm.weight") and draw.regime == "large":
                out[name] = 8.0 * p
        return out

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        """What PAST random keys and values leave behind; of a ReLU map, one feature that no key had."""
        config, random = self.setting(draw), draw.generator("state")
        shape = (inputs.batch, PAST, config.n_heads, config.head_width)
        position = PAST + far(random.integers(0, 1000, inputs.batch), draw.generator("far"))
        state: Arrays = {"position": position.astype(np.int32)}
        for i in range(config.n_layers):
            keys, v = feature_map(config.feature_map, random.normal(size=shape), np.ones(1)), random.normal(size=shape)
            if config.feature_map == "relu":
                keys[..., 0] = 0
            where = state["position"][:, None] + np.arange(-PAST, 0)
            turned = rotate(keys, where, config.rope_base) if config.rope == "numerator" else keys
            decay = np.append(1, 1 / (1 + np.exp(-inputs.params[f"layers.{i}.mixer.decay.bias"])))
            kept = decay[:, None] ** np.arange(PAST)[::-1]
            state[f"layers.{i}.S"] = np.einsum("ms,bshk,bshv->bmhkv", kept, turned, v + 4 * (draw.regime == "offset"))
            state[f"layers.{i}.z"] = np.einsum("ms,bshk->bmhk", kept, keys)
        return {name: state[name].astype(a.dtype) for name, a in inputs.state.items()}

    def reach(self, setting: InfinityFormerConfig, dtype: str, state: str) -> int | None:
        """The context path forgets nothing."""
        return None


FIELDS = {
    "n_layers": (1, 2),
    "feature_map": ("elu1", "relu", "learned"),
    "rope": ("before", "numerator", "none"),
    "decay": ("learned", "data"),
    "gate": ("scalar", "vector"),
    "n_scales": (1, 3),
    "tie_head": (False, True),
    "head_bias": (False, True),
}


def _accepted(row: dict) -> bool:
    return not (row["feature_map"] == "relu" and row["rope"] == "numerator")


CASES = (MultiScale(), InfinityFormer())
