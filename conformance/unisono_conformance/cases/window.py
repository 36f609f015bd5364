"""Attention over a window alone before the court: carried keys and values, slots that are empty yet, K ≠ V, and gradients of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, state_dtype
from unisono_spec.ops import window

from unisono_conformance.cases.base import OpCase, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs

HEADS, KEYS, VALUES, WINDOW = 2, 3, 2, 5


def _size(a: np.ndarray) -> np.ndarray:
    """|a|, which grows where `a` is moved."""
    return np.abs(np.real(a)) + 1j * np.imag(a)


class Window(OpCase):
    """`sharp`: scores so large that a query reads little but one key."""

    name, arch, op, module = "lat/window", "lat", "window", window
    for_kernels = True
    variants: Mapping[str, Any] = {"plain": {}}
    defaults = ("plain",)
    regimes = ("tame", "offset", "large", "sharp")
    narrow = ("q", "k", "v")
    always_rounds = True
    states = ("initial_state.keys", "initial_state.values", "initial_state.count")
    # Kernels (kernels/window) take carried keys and values in the dtype. o: weights, carried values, and itself. Gradients: δ, o inside
    # do·o, and themselves; q's by carried keys and values besides; of values weights, and themselves where they are the tokens'.
    rounds: Mapping[str, int] = {"o": 3, "q": 5, "k": 3, "v": 2, "initial_state.keys": 3, "initial_state.values": 1}

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        random, shape = draw.generator("qkv"), (draw.batch, draw.length, HEADS)
        size = 30 if draw.regime == "large" else 1
        arrays = {name: (4 if draw.regime == "sharp" else 1) * random.normal(size=(*shape, KEYS)) for name in "qk"}
        arrays["v"] = size * random.normal(size=(*shape, VALUES)) + 4 * (draw.regime == "offset")
        return Inputs(self.cast(arrays, dtype), self.fresh_state(None, {}, draw.batch, draw.length, dtype))

    def fresh_state(self, setting: Any, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        wide, shape = DTYPES[state_dtype(dtype)], (batch, WINDOW, HEADS)
        return dict(
            zip(self.states, (np.zeros((*shape, KEYS), wide), np.zeros((*shape, VALUES), wide), np.zeros(batch, np.int32)), strict=True)
        )

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        random, (keys, values, count) = draw.generator("state"), (inputs.state[name] for name in self.states)
        held = random.integers(0, 2 * WINDOW, len(count)).astype(count.dtype)
        there = (np.arange(WINDOW) >= WINDOW - held[:, None])[..., None, None]
        drawn = (np.where(there, random.normal(size=a.shape) + 4 * (draw.regime == "offset" and a is values), 0) for a in (keys, values))
        return dict(zip(self.states, (*(a.astype(keys.dtype) for a in drawn), held), strict=True))

    def flip(self, setting: dict, inputs: Inputs, time: int) -> Inputs:
        arrays = {name: a.copy() for name, a in inputs.arrays.items()}
        for name, a in arrays.items():
            a[:, time] = np.where(a[:, time] > 0, -6, 6) if name == "v" else np.where(a[:, time] > 0, -1, 1)
        return inputs.replace(arrays=arrays)

    def terms(self, inputs: Inputs) -> Inputs:
        return inputs

    def absolute(self, setting: dict[str, Any], inputs: Inputs, form: str) -> Output:
        o, last = self.steep(setting, inputs, form)
        return np.real(o), {name: np.abs(np.real(a)) if a.dtype.kind != "i" else np.zeros(a.shape) for name, a in last.items()}

    def steepest(self, inputs: Inputs) -> Inputs:
        return inputs

    def steep(self, setting: dict, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """o = Σ p v, where p errs by p (1 + a + Σ p a) if scores err by their sizes a = |q|·|k| / √K; and ∂o = Σ p (v − o) ∂s, with +."""
        valid = np.ones((inputs.batch, inputs.length), bool) if inputs.valid is None else inputs.valid
        q, k, v = (np.where(valid[..., None, None], inputs.arrays[name], 0) for name in "qkv")
        keys, values, count = (inputs.state[name] for name in self.states)
        _, last = self.reference(setting, inputs, form)
        index = _read(count, inputs.reset, valid)  # [B, T, w]
        row = np.arange(len(q))[:, None, None]
        k, v = (np.concatenate([old, new], 1)[row, index] for old, new in ((keys, k), (values, v)))  # [B, T, w, H, ·]
        there, root = (index >= 0)[..., None], q.shape[-1] ** 0.5
        score = np.where(there, np.einsum("bthk,btwhk->btwh", np.real(q), np.real(k)) / root, -np.inf)
        weight = np.exp(score - np.where(there.any(2, keepdims=True), score.max(2, keepdims=True), 0))
        weight = weight / np.maximum(weight.sum(2, keepdims=True), np.finfo(np.float64).tiny)
        size = np.where(there, np.einsum("bthk,btwhk->btwh", _size(q), _size(k)) / root, 0)
        off = weight * (1 + np.real(size) + (weight * np.real(size)).sum(2, keepdims=True))
        mean = np.einsum("btwh,btwhv->bthv", weight, np.abs(np.real(v)))
        moved = _size(v) + 1j * np.imag(size)[..., None] * (np.abs(np.real(v)) + mean[:, :, None])
        return np.einsum("btwh,btwhv->bthv", off, moved), last

    def reach(self, setting: dict, dtype: str, state: str) -> int | None:
        return WINDOW


def _read(count: np.ndarray, reset: np.ndarray | None, valid: np.ndarray) -> np.ndarray:
    """What each valid token reads, among the w carried keys and the T new ones: [B, T, w]; −1: nothing."""
    batch, length = valid.shape
    segment = np.zeros((batch, length), int) if reset is None else np.cumsum(reset, 1)
    out = np.full((batch, length, WINDOW), -1)
    for b in range(batch):
        tokens = np.flatnonzero(valid[b])
        if not len(tokens):
            continue
        carried = np.arange(max(0, WINDOW - count[b]), WINDOW)
        order = np.concatenate([np.full(WINDOW - 1, -1), carried, WINDOW + tokens])
        of = np.concatenate([np.full(WINDOW - 1, -1), 0 * carried, segment[b, tokens]])
        bands = [np.lib.stride_tricks.sliding_window_view(a, WINDOW)[len(carried) :] for a in (order, of)]
        out[b, tokens] = np.where(bands[1] == segment[b, tokens][:, None], bands[0], -1)
    return out
