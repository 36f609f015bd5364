"""Attention at several time scales alone before the court: q ≠ q', decays of tokens, gates of channels, and gradients of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, state_dtype
from unisono_spec.ops import multiscale
from unisono_spec.ops.features import feature_map

from unisono_conformance.cases.base import OpCase, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs

HEADS, KEYS, VALUES, SCALES = 2, 3, 2, 3
PAST = 6  # tokens that a running sequence has read
SHIFT = {"near_one": -4.0, "forgetting": 2.5}  # of log(−log λ)
NORMS = {"q": "q_norm", "k": "k_norm"}


def _wide(a: np.ndarray) -> np.ndarray:
    return a if a.dtype.kind == "c" else a.astype(np.float64)


class MultiScale(OpCase):
    """The first scale forgets nothing. Weights and log λ are in the state dtype, as InfinityFormer makes them.

    `near_one`, `forgetting`: λ about 0.998, and down to e⁻¹⁰. `faint`: denominators as small as ε.
    """

    name, arch, op, module = "infinityformer/multiscale", "infinityformer", "multiscale", multiscale
    for_kernels = True
    variants: Mapping[str, Any] = {"scalar": {}, "vector": {}}
    defaults = ("scalar",)
    regimes = ("tame", "near_one", "forgetting", "offset", "large", "faint")
    narrow = ("q", "k", "v", "q_norm", "k_norm")
    states = ("initial_state.S", "initial_state.z")
    # Kernels (kernels/multiscale): o by scores, or by a state, whose terms were rounded before it was; and o itself. Gradients: δ by a
    # state, the masked scores, and themselves; v's by gradients of states; weights' δ; log λ's pairs, and a state where it meets its
    # gradient. A final state's terms, and those of the initial one's gradient, once each.
    rounds: Mapping[str, int] = {
        "o": 3, "q": 4, "k": 4, "q_norm": 4, "k_norm": 4, "v": 3, "weight": 2, "log_decay": 3, "initial_state.S": 1, "initial_state.z": 2,
        "final initial_state.S": 1,
    }  # fmt: skip

    def rounding(self, draw: Draw) -> Mapping[str, int]:
        """A weight for each channel is one pass a scale: o is rounded in each, what comes back is before them, and gradients are added."""
        if draw.variant == "scalar":
            return self.rounds
        return {name: n + (1 if name == "o" else 0 if name.startswith("final") else 2) for name, n in self.rounds.items()}

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        arrays = self.drawn(draw, "tokens", (draw.batch, draw.length))
        return Inputs(self.cast(arrays, dtype), self.fresh_state(None, {}, draw.batch, draw.length, dtype))

    def drawn(self, draw: Draw, purpose: str, shape: tuple[int, int]) -> Arrays:
        """The arguments of `shape` tokens under the regime of `draw`."""
        random = draw.generator(purpose)
        faint, size = 6 * (draw.regime == "faint"), 30 if draw.regime == "large" else 1
        norms = {n: size * feature_map("elu1", random.normal(size=(*shape, HEADS, KEYS)) - faint, np.ones(1)) for n in NORMS.values()}
        # as long as those of the normaliser, and turned
        turned = {n: norms[NORMS[n]] * np.cos(random.uniform(0, np.pi, size=(*shape, HEADS, KEYS))) for n in NORMS}
        log_decay = -np.exp(random.normal(size=(*shape, SCALES)) - 2 + SHIFT.get(draw.regime, 0))
        log_decay[..., 0] = 0
        gates = (HEADS, VALUES) if draw.variant == "vector" else (1, 1)
        v = size * random.normal(size=(*shape, HEADS, VALUES)) + 4 * (draw.regime == "offset")
        return {**turned, "v": v, **norms, "log_decay": log_decay, "weight": random.uniform(0.1, 1, size=(*shape, SCALES, *gates))}

    def fresh_state(self, setting: Any, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        wide, head = DTYPES[state_dtype(dtype)], (batch, SCALES, HEADS, KEYS)
        return dict(zip(self.states, (np.zeros((*head, VALUES), wide), np.zeros(head, wide)), strict=True))

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        """What PAST other tokens leave behind."""
        past = self.drawn(draw, "state", (inputs.batch, PAST))
        kept = np.exp(np.cumsum(past["log_decay"][:, ::-1], 1)[:, ::-1] - past["log_decay"])  # [B, T, M]
        left = np.einsum("btm,bthk,bthv->bmhkv", kept, past["k"], past["v"]), np.einsum("btm,bthk->bmhk", kept, past["k_norm"])
        return {name: a.astype(inputs.state[name].dtype) for name, a in zip(self.states, left, strict=True)}

    def flip(self, setting: dict, inputs: Inputs, time: int) -> Inputs:
        arrays = {name: a.copy() for name, a in inputs.arrays.items()}
        for name in (*NORMS, *NORMS.values()):
            arrays[name][:, time] = 2
        arrays["v"][:, time] = np.where(arrays["v"][:, time] > 0, -6, 6)
        return inputs.replace(arrays=arrays)

    def terms(self, inputs: Inputs) -> Inputs:
        """As linear attention's: each r = N / (D + ε) errs by no more than twice what |q|, |k|, |v| and |S| yield."""
        positive, S = self.steepest(inputs), self.states[0]
        return positive.replace(
            arrays={**positive.arrays, "v": 2 * positive.arrays["v"]}, state={**positive.state, S: 2 * positive.state[S]}
        )

    def steepest(self, inputs: Inputs) -> Inputs:
        absolute = inputs.absolute()
        return absolute.replace(arrays={**absolute.arrays, "log_decay": inputs.arrays["log_decay"]})

    def steep(self, setting: dict, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """∂r = ∂N / (D + ε) − N ∂D / (D + ε)² cancels; with + it is the sum of its terms."""
        given = {name: _wide(a) for name, a in inputs.arrays.items()}
        S, z = (_wide(inputs.state[name]) for name in self.states)
        marked = inputs.batch, inputs.length
        segment = np.zeros(marked, int) if inputs.reset is None else np.cumsum(inputs.reset, 1)
        valid = np.ones(marked, bool) if inputs.valid is None else inputs.valid
        given = {n: np.where(valid.reshape(*marked, *(1,) * (a.ndim - 2)), a, 0) for n, a in given.items()}
        q, k, v, q_norm, k_norm, log_decay, c = (given[n] for n in ("q", "k", "v", "q_norm", "k_norm", "log_decay", "weight"))
        total = np.cumsum(log_decay, 1)  # [B, T, M]
        reads = np.tril(segment[:, :, None] == segment[:, None, :])[..., None]
        decay = np.exp(np.where(reads, total[:, :, None] - total[:, None], -np.inf))  # [B, T, T, M]
        kept = np.exp(np.where((segment == 0)[..., None], total, -np.inf))
        N = np.einsum("btjm,bthk,bjhk,bjhv->btmhv", decay, q, k, v, optimize=True)
        N = N + np.einsum("btm,bthk,bmhkv->btmhv", kept, q, S, optimize=True)
        D = np.einsum("btjm,bthk,bjhk->btmh", decay, q_norm, k_norm, optimize=True)
        D = (D + np.einsum("btm,bthk,bmhk->btmh", kept, q_norm, z, optimize=True))[..., None]
        size = np.real(D) + multiscale.EPS
        o = (c * (N / size + np.real(N) * D / size**2)).sum(2)
        last, whole = decay[:, -1], kept[:, -1]
        S = np.einsum("bjm,bjhk,bjhv->bmhkv", last, k, v, optimize=True) + whole[..., None, None, None] * S
        z = np.einsum("bjm,bjhk->bmhk", last, k_norm) + whole[..., None, None] * z
        return o, dict(zip(self.states, (S, z), strict=True))

    def reach(self, setting: dict, dtype: str, state: str) -> int | None:
        """The first scale forgets nothing."""
        return None
