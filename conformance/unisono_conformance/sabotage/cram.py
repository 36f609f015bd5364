"""Mistakes in CRAM, above all those that were made."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
from unisono_spec.layers import cram as layer
from unisono_spec.layers import norm
from unisono_spec.models import cram as model
from unisono_spec.ops import decayed_sum, position, weighted_sum
from unisono_spec.ops.elementwise import binary_digits, sigmoid

from unisono_conformance.sabotage import Adapter, Sabotage, without
from unisono_conformance.sabotage.cram_departures import DEPARTURES

DECAYED, WEIGHTED, POSITION = decayed_sum.parallel, weighted_sum.parallel, position.parallel


def sequences(change) -> tuple:
    """Both parallel ops, with `change(parallel, x, a, initial_state, reset, valid, **more)` in their place; a: decay, or s."""

    def wrapped(original):
        def run(x, decay=None, initial_state=None, reset=None, valid=None, *args, s=None, **more):
            a = decay if s is None else s
            names = ("exclusive", "chunk_size") if original is WEIGHTED else ("chunk_size",)
            return change(original, x, a, initial_state, reset, valid, **dict(zip(names, args, strict=False)), **more)

        return run

    return ((decayed_sum, "parallel", wrapped(DECAYED)), (weighted_sum, "parallel", wrapped(WEIGHTED)))


def _feature_axis(f, x, a, initial_state, reset, valid, **more):
    u = sigmoid(x) if isinstance(a, float) else a[..., None] * sigmoid(x)
    xi = np.cumsum(u, -1)
    return xi, xi[:, -1]


def _non_causal(f, x, a, initial_state, reset, valid, **more):
    xi, last = f(x, a, initial_state, reset, valid, **more)
    return np.broadcast_to(last[:, None], xi.shape).copy(), last


def _memoryless(f, x, a, initial_state, reset, valid, **more):
    every = np.ones(x.shape[:2], bool)
    return f(x, a, initial_state, every, valid, **more)


def _window(f, x, a, initial_state, reset, valid, **more):
    """Tokens more than 12 before the end are forgotten: invisible in short tests."""
    if x.shape[1] <= 12:
        return f(x, a, initial_state, reset, valid, **more)
    o, _ = f(x, a, initial_state, reset, valid, **more)
    tail = {**more, "chunk_size": 64}
    s = a if isinstance(a, float) else a[:, -12:]
    return o, f(x[:, -12:], s, np.zeros_like(initial_state), None, None, **tail)[1]


def _shifted(f, x, a, initial_state, reset, valid, **more):
    xi, last = f(x, a, initial_state, reset, valid, **more)
    return np.concatenate([initial_state[:, None], xi[:, :-1]], 1), last


def _early(f, x, a, initial_state, reset, valid, **more):
    xi, last = f(x, a, initial_state, reset, valid, **more)
    return xi, xi[:, -2] if xi.shape[1] > 1 else last


def _narrow(dtype: Any):
    def run(f, x, a, initial_state, reset, valid, **more):
        out, state = [], initial_state
        for t in range(x.shape[1]):
            s = a if isinstance(a, float) else a[:, t : t + 1]
            marks = (None if m is None else m[:, t : t + 1] for m in (reset, valid))
            with np.errstate(over="ignore"):
                o, state = f(x[:, t : t + 1], s, state, *marks, **more)
                state = state.astype(dtype).astype(initial_state.dtype)
            out.append(o)
        return np.concatenate(out, 1), state

    return run


def _narrow_output(f, x, a, initial_state, reset, valid, **more):
    xi, last = f(x, a, initial_state, reset, valid, **more)
    with np.errstate(over="ignore"):
        return xi.astype(np.float16).astype(xi.dtype), last


def _no_carry(f, x, a, initial_state, reset, valid, chunk_size=64, **more):
    reset = np.zeros(x.shape[:2], bool) if reset is None else reset.copy()
    reset[:, chunk_size::chunk_size] = True
    return f(x, a, initial_state, reset, valid, chunk_size=chunk_size, **more)


def _reset_at_chunks(f, x, a, initial_state, reset, valid, chunk_size=64, **more):
    if reset is not None:
        kept = np.zeros_like(reset)
        kept[:, ::chunk_size] = reset[:, ::chunk_size]
        reset = kept
    return f(x, a, initial_state, reset, valid, chunk_size=chunk_size, **more)


def _reset_late(f, x, a, initial_state, reset, valid, **more):
    if reset is not None:
        reset = np.concatenate([np.zeros_like(reset[:, :1]), reset[:, :-1]], 1)
    return f(x, a, initial_state, reset, valid, **more)


def _reset_needs_valid(f, x, a, initial_state, reset, valid, **more):
    if reset is not None and valid is not None:
        reset = reset & valid
    return f(x, a, initial_state, reset, valid, **more)


def _nan_leaks(f, x, a, initial_state, reset, valid, **more):
    if valid is None:
        return f(x, a, initial_state, reset, valid, **more)
    xi, last = f(x, a, initial_state, reset, valid, **more)
    leak = (x * valid[..., None]).sum((1, 2))  # 0 · NaN
    return xi + 0 * leak[:, None, None], last + 0 * leak[:, None]


def _state_leaks(f, x, a, initial_state, reset, valid, **more):
    xi, last = f(x, a, initial_state, reset, valid, **more)
    return xi + 0 * initial_state[:, None], last + 0 * initial_state


def _padding_counts(f, x, a, initial_state, reset, valid, **more):
    """An invalid token adds nothing, but the state decays past it."""
    if valid is not None and isinstance(a, float):
        x = np.where(valid[..., None], x, -np.inf if x.dtype.kind == "f" else -1e3)
        valid = None
    return f(x, a, initial_state, reset, valid, **more)


def _mixed_rows(f, x, a, initial_state, reset, valid, **more):
    return f(x, a, np.broadcast_to(initial_state[:1], initial_state.shape), reset, valid, **more)


def _output_index(f, x, a, initial_state, reset, valid, **more):
    if isinstance(a, float):
        return f(x, a, initial_state, reset, valid, **more)
    xi, _ = f(x, np.ones_like(a), initial_state, reset, valid, **more)
    xi = a[..., None] * xi  # eq 7 as printed
    return xi, xi[:, -1]


def _naive_powers(f, x, a, initial_state, reset, valid, **more):
    if not isinstance(a, float) or reset is not None or valid is not None:
        return f(x, a, initial_state, reset, valid, **more)
    t = np.arange(1, x.shape[1] + 1)[:, None].astype(x.dtype)
    with np.errstate(all="ignore"):
        growth = np.asarray(1 / a, x.dtype) ** t  # 2^t: not finite from t = 128 in float32
        xi = (np.cumsum(growth * (1 - a) * sigmoid(x), 1) + initial_state[:, None]) / growth
    return xi, xi[:, -1]


def _swapped_decay(f, x, a, initial_state, reset, valid, **more):
    return f(x, 1 - a if isinstance(a, float) else a, initial_state, reset, valid, **more)


def _excluded(f, x, a, initial_state, reset, valid, **more):
    if "exclusive" in more:
        more["exclusive"] = not more["exclusive"]
    return f(x, a, initial_state, reset, valid, **more)


def _restarted(initial_state, length, reset=None, valid=None):
    return POSITION(np.zeros_like(initial_state), length, reset, valid)


def _counts_padding(initial_state, length, reset=None, valid=None):
    return POSITION(initial_state, length, reset, None)


def _score(**changes):
    """s_φ under another config."""
    original = layer.scored_input

    def run(p, config, x, where, rounded):
        return original(p, config.replace(**changes), x, where, rounded)

    return run


def _cut_above(f, x, a, initial_state, reset, valid, chunk_size=64, **more):
    """Above 64 chunks weights are constants."""
    if x.shape[1] > 64 * chunk_size and not isinstance(a, float):
        a = np.real(a).astype(a.dtype)
    return f(x, a, initial_state, reset, valid, chunk_size=chunk_size, **more)


def _straight_through(x):
    value = sigmoid(x.real)
    return value + 1j * x.imag if x.dtype.kind == "c" else value


def _slope_by_value(x):
    """σ' as y(1−y), which has no digits left where y is nearly 1."""
    if x.dtype.kind != "c":
        return sigmoid(x)
    y = sigmoid(x.real)
    return y + 1j * (y * (1 - y)) * x.imag


def _low_bits_first(n, digits, dtype):
    return binary_digits(n, digits, dtype)[..., ::-1]


def _sharper_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).sum(-1, keepdims=True) / (x.shape[-1] - 1) + 1e-5) * weight + bias


class _Wrapped:
    """A model with some of its answers changed."""

    def __init__(self, inner: Any, **changes: Any) -> None:
        self._inner, self._changes = inner, changes

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        change = self._changes.get(name)
        return method if change is None else lambda *a, **k: change(self._inner, method, *a, **k)


def _model(**changes: Any):
    return lambda inner: _Wrapped(inner, **changes)


def _no_state_gradient(inner, vjp, *args, **kwargs):
    return without(vjp(*args, **kwargs), lambda kind, name: kind == "state")


def _final_state_ignored(inner, vjp, tokens, dlogits, dstate, *args, **kwargs):
    return vjp(tokens, dlogits, {n: np.zeros_like(a) for n, a in dstate.items()}, *args, **kwargs)


def _only_recorded(inner, vjp, *args, **kwargs):
    g = vjp(*args, **kwargs)
    return dataclasses.replace(g, o=(g.o * 1.5).astype(g.o.dtype))


def _no_score_gradient(inner, vjp, *args, **kwargs):
    return without(vjp(*args, **kwargs), lambda kind, name: name.endswith("mixer.Q"))


def _dropping(inner, forward, tokens, *args, **kwargs):
    o, state = forward(tokens, *args, **kwargs)
    return o * (np.random.default_rng(tokens.size).random(o.shape) >= inner.config.dropout), state


def _noisy(inner, forward, *args, **kwargs):
    o, state = forward(*args, **kwargs)
    ulp = np.random.default_rng().integers(-1, 2, o.shape)  # fresh entropy each time
    return (o + ulp * np.spacing(o)).astype(o.dtype), state


def _wide_logits(inner, forward, *args, **kwargs):
    o, state = forward(*args, **kwargs)
    return o.astype(np.float64), state


def _in_float32(inner, forward, tokens, state=None, *args, **kwargs):
    o, last = forward(tokens, state, *args, **kwargs)
    return o.astype(np.float32).astype(o.dtype), last


def _renamed(inner, params):
    return {n.replace("layers", "blocks"): a for n, a in params().items()}


def _transposed(inner, params):
    return {n: a.T.copy() if a.ndim == 2 else a for n, a in params().items()}


def _crash_on_nobody(inner, forward, tokens, *args, **kwargs):
    tokens[0]
    return forward(tokens, *args, **kwargs)


def _swap_names(adapter: Adapter) -> None:
    build = adapter.build

    def swapped(config, params, *args):
        names = {n: n.replace("norm.weight", "norm.bias") if "norm.weight" in n else n.replace("norm.bias", "norm.weight") for n in params}
        return build(config, {n: params[names[n]] for n in params}, *args)

    adapter.build = swapped  # pyright: ignore[reportAttributeAccessIssue]


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

SABOTAGES = (
    Sabotage("sum over the feature axis", "P5", sequences(_feature_axis)),
    Sabotage("non-causal sum", "P5", sequences(_non_causal)),
    Sabotage("ignores its past", "P5", sequences(_memoryless)),
    Sabotage("forgets after 12 tokens", "P5r", sequences(_window)),
    Sabotage("off-by-one shift", "P1", sequences(_shifted)),
    Sabotage("exclusive where inclusive", "P1", sequences(_excluded)),
    Sabotage("weights of the output's index (eq 7 as printed)", "P3", sequences(_output_index)),
    Sabotage("decay and 1−decay swapped", "P1", sequences(_swapped_decay)),
    Sabotage("bfloat16 accumulator", "P1", sequences(_narrow(BFLOAT16))),
    Sabotage("float16 overflow in ξ", "P10", sequences(_narrow_output)),
    Sabotage("2^t·cumsum(2^−t u), not finite from t=128", "P10", sequences(_naive_powers)),
    Sabotage("float64 rounded to float32 on the way out", "P1", model=_model(forward=_in_float32), dtype="float64"),
    Sabotage("state dropped at chunk boundaries", "P2", sequences(_no_carry)),
    Sabotage("final state one token early", "P3", sequences(_early)),
    Sabotage("positions restart after hand-over", "P3", ((position, "parallel", _restarted),)),
    Sabotage("reset ignored inside a chunk", "P15r", sequences(_reset_at_chunks)),
    Sabotage("reset acts one token late", "P15r", sequences(_reset_late)),
    Sabotage("reset lost where its token is not valid", "P15", sequences(_reset_needs_valid)),
    Sabotage("invalid tokens advance the position", "P15v", ((position, "parallel", _counts_padding),)),
    Sabotage("invalid tokens decay the state", "P15v", sequences(_padding_counts)),
    Sabotage("NaN in padding leaks", "P15v", sequences(_nan_leaks)),
    Sabotage("NaN of a state that is reset leaks", "P15r", sequences(_state_leaks)),
    Sabotage("rows mixed by broadcasting", "P6", sequences(_mixed_rows)),
    Sabotage("gradient of the initial state missing", "P7", model=_model(vjp=_no_state_gradient)),
    Sabotage("gradient of the final state ignored", "P7", model=_model(vjp=_final_state_ignored)),
    Sabotage("gradient of weights cut above 64 chunks", "P7s", sequences(_cut_above)),
    Sabotage("other outputs while gradients are recorded", "P7", model=_model(vjp=_only_recorded)),
    Sabotage("gradient cut at the quadratic key", "P7", model=_model(vjp=_no_score_gradient)),
    Sabotage(
        "gradient through σ taken as 1", "P7",
        ((decayed_sum, "sigmoid", _straight_through), (weighted_sum, "sigmoid", _straight_through)), form="recurrent",
        adapter=lambda a: setattr(a, "capabilities", dataclasses.replace(a.capabilities, gradient_forms=("recurrent",))),
    ),
    Sabotage(
        "gradient through σ as y(1−y)", "P7",
        ((decayed_sum, "sigmoid", _slope_by_value), (weighted_sum, "sigmoid", _slope_by_value)), form="recurrent",
        adapter=lambda a: setattr(a, "capabilities", dataclasses.replace(a.capabilities, gradient_forms=("recurrent",))),
    ),
    Sabotage("parameters renamed", "P8", model=_model(params=_renamed)),
    Sabotage("weights held transposed", "P8", model=_model(params=_transposed)),
    Sabotage("scale and shift swapped", "P1", adapter=_swap_names),
    Sabotage("logits in another dtype", "P9", model=_model(forward=_wide_logits)),
    Sabotage("position bits least significant first", "P1", ((layer, "binary_digits", _low_bits_first),)),
    Sabotage("code bits least significant first", "P1", ((model, "binary_digits", _low_bits_first),)),
    Sabotage("k_scale forgotten", "P1", ((model, "scored_input", _score(k_scale=1.0)),)),
    Sabotage("variance over n−1", "P1", ((norm, "layer_norm", _sharper_norm), (layer, "layer_norm", _sharper_norm))),
    Sabotage("dropout in evaluation", "P1", model=_model(forward=_dropping)),
    Sabotage("nondeterministic last bit", "P16", model=_model(forward=_noisy)),
    Sabotage("crashes on an empty batch", "P11e", model=_model(forward=_crash_on_nobody), dies=IndexError),
    *DEPARTURES,
)  # fmt: skip
