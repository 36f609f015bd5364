"""InfinityFormer before the court."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.ops.features import feature_map
from unisono_spec.ops.rotary import rotate

from unisono_conformance import numerics
from unisono_conformance.cases.base import ModelCase, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.infinityformer_laws import LAWS
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.cases.pairwise import pairwise

PAST = 12  # tokens that a running sequence has read


class InfinityFormer(ModelCase):
    name = arch = "infinityformer"
    defaults = ("learned", "data")
    regimes = ("tame", "near_one", "forgetting", "saturated", "offset", "large", "dropout")
    laws = LAWS
    too_narrow: Mapping[str, tuple[str, ...]] = {"saturated": ("bfloat16",)}

    def __init__(self) -> None:
        small: dict[str, Any] = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ffn": 4, "vocab_size": 7}
        # a dropout rate in the config must not act in evaluation
        self.variants = {
            "learned": InfinityFormerConfig(**small, dropout=0.25),
            "data": InfinityFormerConfig(
                **small, decay="data", gate="vector", rope="numerator", tie_head=False, head_bias=True, dropout=0.25
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
            if name.endswith("norm.weight") and draw.regime == "large":
                out[name] = 8.0 * p
        return out

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        """What PAST random keys and values leave behind; of a ReLU map, one feature that no key had."""
        config, random = self.setting(draw), draw.generator("state")
        shape = (inputs.batch, PAST, config.n_heads, config.head_width)
        state: Arrays = {"position": random.integers(PAST, 1000, inputs.batch).astype(np.int32)}
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

    def reference(self, setting: InfinityFormerConfig, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """A computed decomposition is exact for some S + E with ‖E‖ ≤ p(K) u ‖S‖ (LAPACK Users' Guide, section 4.9; p(K) = K here):
        where S is compressed, each of its elements may err by that, however small its row is; of n decompositions, by √n of it."""
        o, last = super().reference(setting, inputs, form, dtype, rounded)
        if rounded is not None and setting.compress_every:
            sums = numerics.perturbation("float32")
            times = np.sqrt(-(-inputs.length // setting.compress_every))
            for name, S in last.items():
                if name.endswith(".S"):
                    size = np.sqrt((np.real(S) ** 2).sum((-1, -2), keepdims=True))
                    last[name] = S + setting.head_width * times * (sums(size) - size)
        return o, last

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


CASES = (InfinityFormer(),)
