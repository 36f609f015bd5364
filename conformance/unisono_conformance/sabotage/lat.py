"""Mistakes in LAT, Based and their ops."""

from __future__ import annotations

import numpy as np
from unisono_spec.layers import lat as layer
from unisono_spec.models import lat as model
from unisono_spec.ops import features, linear_attention, short_conv, window
from unisono_spec.ops.elementwise import linear
from unisono_spec.ops.fold import fold
from unisono_spec.ops.rotary import rotate

from unisono_conformance.judging.patches import patched
from unisono_conformance.sabotage import Sabotage

LINEAR, WINDOW, CONV = linear_attention.parallel, window.parallel, short_conv.parallel
EPS = linear_attention.EPS


def _normaliser_dropped(q, k, v, initial_state, reset=None, valid=None, chunk_size=64):
    o, (S, z) = LINEAR(q, k, v, initial_state, reset, valid, chunk_size)
    return o, (S, np.zeros_like(z))


def _rows_mixed(q, k, v, initial_state, reset=None, valid=None, chunk_size=64):
    S, z = initial_state
    return LINEAR(q, k, v, (S, np.broadcast_to(z[:1], z.shape)), reset, valid, chunk_size)


def _last_chunk_only(q, k, v, initial_state, reset=None, valid=None, chunk_size=64):
    """What a chunk added is not handed to the next: each reads the initial state."""
    out, last = [], initial_state
    for start in range(0, q.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        r, u = (None if m is None else m[:, part] for m in (reset, valid))
        o, last = LINEAR(q[:, part], k[:, part], v[:, part], initial_state, r, u)
        out.append(o)
    return np.concatenate(out, 1), last


def _other_epsilon(*args, **more):
    with patched(((linear_attention, "EPS", 1e-9),)):
        return LINEAR(*args, **more)


def _future_shown(q, k, v, initial_state, reset=None, valid=None, chunk_size=64):
    """Each query reads what the last one may: the mask is not causal."""
    _, (S, z) = LINEAR(q, k, v, initial_state, reset, valid, chunk_size)
    q = q if valid is None else np.where(valid[..., None, None], q, 0)
    return np.einsum("bthk,bhkv->bthv", q, S) / (np.einsum("bthk,bhk->bth", q, z)[..., None] + EPS), (S, z)


def _initial_normaliser_constant(q, k, v, initial_state, reset=None, valid=None, chunk_size=64):
    S, z = initial_state
    return LINEAR(q, k, v, (S, np.real(z)), reset, valid, chunk_size)


def _folded(keys_of=None, cut=None, forgets=True):
    """Linear attention, token by token, with another normaliser.

    keys_of: what z adds, of k and valid. cut: what stands in the denominator. forgets: whether a reset clears z.
    """

    def step(q, k, v, state, reset=None, valid=None):
        S, z = state
        if reset is not None:
            S = np.where(reset[:, None, None, None], 0, S)
            z = np.where(reset[:, None, None], 0, z) if forgets else z
        added = k
        if valid is not None:
            q, k, v = (np.where(valid[:, None, None], a, 0) for a in (q, k, v))
            added = added if keys_of == "all" else k
        S, z = S + k[..., :, None] * v[..., None, :], z + added
        bottom = (q * z).sum(-1, keepdims=True) + EPS
        return (q[..., None] * S).sum(-2) / (np.real(bottom) if cut else bottom), (S, z)

    return lambda q, k, v, initial_state, reset=None, valid=None, chunk_size=64: fold(step, (q, k, v), initial_state, reset, valid)


def _heads_not_normed(p, o, rounded):
    return layer.from_heads({name: a for name, a in p.items() if name != "mixer.head_norm.weight"}, o, rounded)


def _wider_window(q, k, v, initial_state, reset, valid, chunk_size):
    keys, values, count = initial_state
    room = ((0, 0), (1, 0), (0, 0), (0, 0))
    o, (keys, values, count) = WINDOW(q, k, v, (np.pad(keys, room), np.pad(values, room), count), reset, valid, chunk_size)
    return o, (keys[:, 1:], values[:, 1:], count)


def _window_takes_padding(q, k, v, initial_state, reset, valid, chunk_size):
    """Tokens that are not valid push others out of the window."""
    if valid is None:
        return WINDOW(q, k, v, initial_state, reset, valid, chunk_size)
    q, k, v = (np.where(valid[..., None, None], a, 0) for a in (q, k, v))
    o, last = WINDOW(q, k, v, initial_state, reset, None, chunk_size)
    return np.where(valid[..., None, None], o, 0), last


def _conv_from_nothing(x, weight, bias, initial_state, reset, valid, chunk_size):
    return CONV(x, weight, bias, np.zeros_like(initial_state), reset, valid, chunk_size)


def restarting(x, position, base):
    """Positions count from the beginning of the call."""
    return rotate(x, position - position[:, :1] if position.ndim > 1 else position, base)


def halved(x, position, base):
    return rotate(x, position, base / 2)


def two_digits(x, position, base):
    """Of a position's digits in base 256 the third and the fourth are lost."""
    return rotate(x, position % 65536, base)


def unscaled(original):
    """Scores q·k without 1/√K."""
    return lambda q, *rest: original(q * q.shape[-1] ** 0.5, *rest)


def _scrambled(p, o, rounded):
    """Values before heads."""
    o = np.swapaxes(o, -1, -2)
    return rounded(linear(rounded(o.reshape(*o.shape[:-2], -1)), p["mixer.out.weight"], p.get("mixer.out.bias")))


def _gate_and_input_swapped(p, x, rounded):
    return layer.conv_inputs(p, x, rounded)[::-1]


def _naive_elu1(x):
    return np.where(np.real(x) > 0, x + 1, (np.exp(np.where(np.real(x) > 0, 0, x)) - 1) + 1)


def _taylor2(x):
    """Without the 1/√2 of the squares."""
    k = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], k * k)
    return np.concatenate([np.ones_like(x[..., :1]), x / k**0.25, square / k**0.5], -1)


def _reset_needs_padding(original):
    """Resets act only where `valid` is given."""

    def run(*args):
        *given, reset, valid, chunk_size = args
        return original(*given, None if valid is None else reset, valid, chunk_size)

    return run


def _padding_needs_resets(original):
    """Padding is left out only where `reset` is given."""

    def run(*args):
        *given, reset, valid, chunk_size = args
        return original(*given, reset, None if reset is None else valid, chunk_size)

    return run


def _empty_marks(original):
    """Takes marks that are true nowhere for marks that are not there."""

    def run(*args):
        *given, reset, valid, chunk_size = args
        return original(*given, reset, None if valid is None or not valid.any() else valid, chunk_size)

    return run


def _positional(change):
    def run(q, k, v, initial_state, reset=None, valid=None, chunk_size=64):
        return change(LINEAR)(q, k, v, initial_state, reset, valid, chunk_size)

    return run


def attention(instead) -> tuple:
    return ((linear_attention, "parallel", instead),)


SABOTAGES = (
    Sabotage("normaliser missing from the state", "P3", attention(_normaliser_dropped)),
    Sabotage("normaliser of another row", "P6", attention(_rows_mixed)),
    Sabotage("chunks do not hand on what they add", "P2", attention(_last_chunk_only)),
    Sabotage("padded keys in the denominator", "P15v", attention(_folded(keys_of="all"))),
    Sabotage("a reset forgets the sum but not its normaliser", "P15r", attention(_folded(forgets=False))),
    Sabotage("gradient cut at the normaliser", "P7", attention(_folded(cut=True))),
    Sabotage("gradient of the initial normaliser missing", "P7", attention(_initial_normaliser_constant)),
    Sabotage("epsilon smaller in one form", "P1", attention(_other_epsilon)),
    Sabotage("mask that shows the future", "P5", attention(_future_shown)),
    Sabotage("elu(x) + 1 by way of e^x − 1", "P1", ((features, "elu1", _naive_elu1),)),
    Sabotage("taylor2 without its 1/√2", "P1", ((features, "taylor2", _taylor2),)),
    Sabotage("window one token too wide", "P1", ((window, "parallel", _wider_window),)),
    Sabotage("padding takes room in the window", "P15v", ((window, "parallel", _window_takes_padding),)),
    Sabotage("window scores without 1/√K", "P1", ((window, "parallel", unscaled(WINDOW)),)),
    Sabotage("convolution window dropped between calls", "P3", ((short_conv, "parallel", _conv_from_nothing),)),
    Sabotage("gate and input of the convolution swapped", "P1", ((model, "conv_inputs", _gate_and_input_swapped),)),
    Sabotage("positions restart at zero after hand-over", "P3", ((layer, "rotate", restarting),)),
    Sabotage("half of RoPE's base", "P1", ((layer, "rotate", halved),)),
    Sabotage("far positions turn by their last two digits", "P1", ((layer, "rotate", two_digits),)),
    Sabotage("linear attention: resets need padding", "P18", attention(_positional(_reset_needs_padding))),
    Sabotage("linear attention: padding needs resets", "P18", attention(_positional(_padding_needs_resets))),
    Sabotage("linear attention: nothing valid is everything valid", "P18", attention(_positional(_empty_marks))),
    Sabotage("convolution: resets need padding", "P18", ((short_conv, "parallel", _reset_needs_padding(CONV)),)),
    Sabotage("window: resets need padding", "P18", ((window, "parallel", _reset_needs_padding(WINDOW)),)),
    Sabotage("heads not normed", "P1", ((model, "from_heads", _heads_not_normed),)),
    Sabotage("heads scrambled by a reshape", "P1", ((model, "from_heads", _scrambled),)),
)
