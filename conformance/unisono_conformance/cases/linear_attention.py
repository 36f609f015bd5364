"""Linear attention alone before the court, where q, k, v and their gradients can be asked for: K ≠ V, offsets, v ≡ 1, empty sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, state_dtype
from unisono_spec.ops import linear_attention
from unisono_spec.ops.features import feature_map

from unisono_conformance.cases.base import Law, OpCase, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs

HEADS, KEYS, VALUES = 2, 3, 4
PAST = 6  # tokens that a running sequence has read


def _ones(trial) -> None:
    """Weights add up to q·z / (q·z + ε): that is what comes of v ≡ 1, in each channel."""
    q, k, v = (trial.inputs.arrays[name] for name in "qkv")
    inputs = trial.inputs.replace(arrays={"q": q, "k": k, "v": np.ones_like(v)})
    total = (q.astype(np.float64) * np.cumsum(k.astype(np.float64), 1)).sum(-1, keepdims=True)
    _, budget = trial.expected(inputs)[0]
    trial.compare(trial.subject.forward(inputs)[0], np.broadcast_to(total / (total + linear_attention.EPS), v.shape), budget, "o of v ≡ 1")


def _wide(a: np.ndarray) -> np.ndarray:
    return a if a.dtype.kind == "c" else a.astype(np.float64)


class LinearAttention(OpCase):
    """`empty`: features of a ReLU, where denominators are sums of nothing; `faint`: of elu(x) + 1, where they are as small as ε."""

    name, arch, op, module = "lat/linear_attention", "lat", "linear_attention", linear_attention
    variants: Mapping[str, Any] = {"normalised": {}}
    defaults = ("normalised",)
    regimes = ("tame", "offset", "large", "faint", "empty")
    # a slope of 1/ε is beyond float16
    too_narrow: Mapping[str, tuple[str, ...]] = {"empty": ("float16",)}
    laws = (Law("v ≡ 1", _ones),)
    narrow = ("q", "k", "v")
    states = ("initial_state.S", "initial_state.z")
    # o: scores or the carried S, and o itself. Gradients (kernels/linear_attention/sweep.py has the sums): q of scores or S, of o inside
    # do·o, and itself; k of q / D besides; v of q / D, scores or S, and itself. S and z, denominators and their sums are float32.
    rounds: Mapping[str, int] = {"o": 2, "q": 3, "k": 4, "v": 3, "initial_state.S": 1, "initial_state.z": 2}

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        shape = (draw.batch, draw.length)
        arrays = self.drawn(draw, "qkv", shape)
        return Inputs(self.cast(arrays, dtype), self.fresh_state(None, {}, draw.batch, draw.length, dtype))

    def drawn(self, draw: Draw, purpose: str, shape: tuple[int, int]) -> Arrays:
        """q, k and v of `shape` tokens under the regime of `draw`."""
        random = draw.generator(purpose)
        q, k = (random.normal(size=(*shape, HEADS, KEYS)) for _ in "qk")
        v = random.normal(size=(*shape, HEADS, VALUES))
        if draw.regime == "empty":
            q, k = (feature_map("relu", x, np.ones(1)) for x in (q, k))
        else:
            q, k = (feature_map("elu1", x - 6 * (draw.regime == "faint"), np.ones(1)) for x in (q, k))
        size = 30 if draw.regime == "large" else 1
        return {"q": size * q, "k": size * k, "v": size * v + 4 * (draw.regime == "offset")}

    def fresh_state(self, setting: Any, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        wide = DTYPES[state_dtype(dtype)]
        return dict(zip(self.states, (np.zeros((batch, HEADS, KEYS, VALUES), wide), np.zeros((batch, HEADS, KEYS), wide)), strict=True))

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        """What PAST other tokens leave behind; under `empty`, one feature that no key had."""
        past = self.drawn(draw, "state", (inputs.batch, PAST))
        k = past["k"]
        if draw.regime == "empty":
            k[..., 0] = 0
        left = np.einsum("bthk,bthv->bhkv", k, past["v"]), k.sum(1)
        return {name: a.astype(inputs.state[name].dtype) for name, a in zip(self.states, left, strict=True)}

    def flip(self, setting: dict, inputs: Inputs, time: int) -> Inputs:
        q, k, v = (inputs.arrays[name].copy() for name in "qkv")
        q[:, time], k[:, time], v[:, time] = 2, 2, np.where(v[:, time] > 0, -6, 6)
        return inputs.replace(arrays={"q": q, "k": k, "v": v})

    def terms(self, inputs: Inputs) -> Inputs:
        """o = N / (D + ε) errs by the terms of N, over D + ε, and by those of D, which are all positive, times o: together no more than
        twice what |v| and |S| yield."""
        S = self.states[0]
        return inputs.replace(
            arrays={**inputs.arrays, "v": 2 * np.abs(inputs.arrays["v"])}, state={**inputs.state, S: 2 * np.abs(inputs.state[S])}
        )

    def steepest(self, inputs: Inputs) -> Inputs:
        return inputs.absolute()

    def steep(self, setting: dict, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """∂o = ∂N / (D + ε) − N ∂D / (D + ε)² cancels where values are alike; with + it is the sum of its terms."""
        q, k, v = (_wide(inputs.arrays[name]) for name in "qkv")
        S, z = (_wide(inputs.state[name]) for name in self.states)
        marked = inputs.batch, inputs.length
        segment = np.zeros(marked, int) if inputs.reset is None else np.cumsum(inputs.reset, 1)
        valid = np.ones(marked, bool) if inputs.valid is None else inputs.valid
        q, k, v = (np.where(valid[..., None, None], a, 0) for a in (q, k, v))
        reads = np.tril(segment[:, :, None] == segment[:, None, :])[..., None]  # [B, T, T, 1]
        first, last = (segment == 0)[..., None], (segment == segment[:, -1:])[..., None, None]
        scores = np.einsum("bthk,bjhk->btjh", q, k) * reads
        N = np.einsum("btjh,bjhv->bthv", scores, v) + first[..., None] * np.einsum("bthk,bhkv->bthv", q, S)
        D = scores.sum(2) + first * np.einsum("bthk,bhk->bth", q, z)
        size = np.real(D)[..., None] + linear_attention.EPS
        kept = first[:, -1]  # [B, 1]
        S = np.einsum("bthk,bthv->bhkv", k * last, v) + kept[..., None, None] * S
        z = (k * last).sum(1) + kept[..., None] * z
        return N / size + np.real(N) * D[..., None] / size**2, dict(zip(self.states, (S, z), strict=True))

    def reach(self, setting: dict, dtype: str, state: str) -> int | None:
        return None
