"""Mistakes in MARU: in its cell, in what is carried, restored and drawn."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from unisono_spec.ops import mom_gru, short_conv
from unisono_spec.ops.elementwise import linear, sigmoid, softmax

from unisono_conformance.sabotage import Sabotage, without

HOISTED, CONV = mom_gru.hoisted, short_conv.parallel


def given(change) -> tuple:
    """The cell with some of its arguments changed: `change(p, state, noise)` gives the changed ones by name."""

    def run(x, p, initial_state, reset, valid, chunk_size, noise, temperature):
        kept = {"p": p, "initial_state": initial_state, "noise": noise, "temperature": temperature} | change(p, initial_state, noise)
        if kept["noise"] is not None:
            kept["noise"] = kept["noise"][:, : x.shape[1]]
        return HOISTED(x, reset=reset, valid=valid, chunk_size=chunk_size, **kept)

    return ((mom_gru, "hoisted", run),)


def _write(M, w, e, a):
    return M * (1 - w * e) + w * a


def _candidate(x, U, r, h):
    return np.tanh(x + linear(r * h, U))


def _attention(M, key):
    return softmax(np.einsum("bnlm,bm->bnl", M, key) * M.shape[-1] ** -0.5)


def cell(
    write=_write, candidate=_candidate, attention=_attention, shares=softmax, restore=lambda M, fresh: fresh, early=False, padded=False
) -> tuple:
    """The cell written out once more, with some of its parts replaced. early: written before it is read. padded: by every token."""

    def run(x, p, initial_state, reset, valid, chunk_size, noise, temperature):
        (h, M), out = initial_state, []
        for t in range(x.shape[1]):
            cut, read, drawn = (None if m is None else m[:, t] for m in (reset, valid, noise))
            if cut is not None:
                h, M = np.where(cut[:, None], 0, h), np.where(cut[:, None, None, None], restore(M, p["memory"]), M)
            new_h, new_M = token(x[:, t] if read is None else np.where(read[:, None], x[:, t], 0), h, M, p, drawn, temperature)
            if read is not None:
                new_h = np.where(read[:, None], new_h, h)
                new_M = new_M if padded else np.where(read[:, None, None, None], new_M, M)
            h, M = new_h, new_M
            out.append(h)
        return np.stack(out, 1), (h, M)

    def token(x, h, M, p, drawn, temperature):
        def through(name, y):
            return linear(y, p[f"{name}.weight"], p[f"{name}.bias"])

        def written(h):
            v = through("value", h)
            e = sigmoid(through("erase", h) if "erase.weight" in p else v)[:, None, None]
            w = (attention(M, through("key", h)) * (rho * sigmoid(through("gate", h)))[..., None])[..., None]
            return write(M, w, e, np.tanh(v)[:, None, None]).astype(M.dtype)

        both = np.concatenate([x, h], -1)
        logits = through("router.1", np.maximum(through("router.0", both), 0))
        rho = shares(logits if drawn is None else (logits + p["balance_bias"] + drawn) / temperature)
        seen = written(h) if early else M
        c = np.einsum("bn,bnl,bnlm->bm", rho, attention(seen, through("query", both)), seen)
        (xr, xz, xh), (Ur, Uz, Uh) = np.split(through("input", np.concatenate([x, c], -1)), 3, -1), np.split(p["hidden.weight"], 3)
        r, zeta = sigmoid(xr + linear(h, Ur)), sigmoid(xz + linear(h, Uz))
        new_h = zeta * h + (1 - zeta) * candidate(xh, Uh, r, h)
        return new_h, seen if early else written(new_h)

    return ((mom_gru, "hoisted", run),)


def _fresh_memory(p, state, noise):
    return {"initial_state": (state[0], np.broadcast_to(p["memory"], state[1].shape))}


def _fresh_h(p, state, noise):
    return {"initial_state": (np.zeros_like(state[0]), state[1])}


def _zero_memory(p, state, noise):
    return {"p": {**p, "memory": np.zeros_like(p["memory"])}}


def _biased(p, state, noise):
    return {"noise": _widths(p, state, noise, np.zeros)}


def _noisy(p, state, noise):
    return {"noise": _widths(p, state, noise, lambda shape: np.random.default_rng().gumbel(size=shape))}


def _widths(p, state, noise, draw):
    """`noise`, or what `draw` gives for sequences of any length where the router is a noisy one."""
    if noise is not None or "balance_bias" not in p:
        return noise
    return draw((len(state[0]), 400, len(p["balance_bias"]))).astype(state[0].dtype)


def _cool_noise(p, state, noise):
    """The temperature divides the noise alone."""
    return {} if noise is None else {"noise": noise / np.asarray(0.7, noise.dtype), "temperature": 1.0}


def _over_rows(logits):
    e = np.exp(logits - logits.max(0))
    return e / e.sum(0)


def _over_banks(M, key):
    scores = np.einsum("bnlm,bm->bnl", M, key) * M.shape[-1] ** -0.5
    return softmax(scores.reshape(len(M), -1)).reshape(scores.shape)


def _no_window(x, weight, bias, initial_state, *more):
    return CONV(x, weight, bias, np.zeros_like(initial_state), *more)


class _Wrapped:
    """A model with one of its answers changed."""

    def __init__(self, inner: Any, name: str, change: Any) -> None:
        self._inner, self._name, self._change = inner, name, change

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        return (lambda *a, **k: self._change(self._inner, method(*a, **k))) if name == self._name else method


def _no_first_memory_gradient(inner, g):
    return without(g, lambda kind, name: name.endswith("cell.memory") and kind == "params")


def _no_first_memory_gradient_without_state(model: Any) -> Any:
    class Cut(_Wrapped):
        """The memory that a model begins with by itself is a constant to it."""

        def vjp(self, tokens, dlogits, dstate, state=None, *args, **kwargs):
            g = self._inner.vjp(tokens, dlogits, dstate, state, *args, **kwargs)
            return g if state is not None else _no_first_memory_gradient(self._inner, g)

    return Cut(model, "", None)


def _moved_load(inner, answer):
    for name, a in inner.spec.params.items():
        if name.endswith("balance_load"):
            inner.spec.params[name] = a + np.asarray(0.01, a.dtype)
    return answer


SABOTAGES = (
    Sabotage("memory dropped between calls", "P3", given(_fresh_memory)),
    Sabotage("h dropped between calls", "P3", given(_fresh_h)),
    Sabotage("convolution window dropped between calls", "P3", ((short_conv, "parallel", _no_window),)),
    Sabotage("memory written before it is read", "P1", cell(early=True)),
    Sabotage("erases after adding", "P1", cell(write=lambda M, w, e, a: (M + w * a) * (1 - w * e))),
    Sabotage("keeps what it should erase", "P1", cell(write=lambda M, w, e, a: M * w * e + w * a)),
    Sabotage("reset gate after the product", "P1", cell(candidate=lambda x, U, r, h: np.tanh(x + r * linear(h, U)))),
    Sabotage("scores of slots not divided by √d_m", "P1", cell(attention=lambda M, k: softmax(np.einsum("bnlm,bm->bnl", M, k)))),
    Sabotage("one softmax over the slots of all banks", "P1", cell(attention=_over_banks)),
    Sabotage("memory held in bfloat16", "P1", cell(write=lambda *given: _write(*given).astype(ml_dtypes.bfloat16))),
    Sabotage("router's softmax over batch rows", "P6", cell(shares=_over_rows)),
    Sabotage("rows write to each other's memory", "P6", cell(write=lambda M, w, e, a: M * (1 - w * e) + (w * a).mean(0))),
    Sabotage("reset restores a memory of zeros", "P15r", given(_zero_memory)),
    Sabotage("reset leaves the memory as it is", "P15r", cell(restore=lambda M, fresh: M)),
    Sabotage("padding writes to the memory", "P15v", cell(padded=True)),
    Sabotage("gradient of the first memory missing", "P7", model=lambda m: _Wrapped(m, "vjp", _no_first_memory_gradient)),
    Sabotage(
        "gradient of the first memory cut where no state is given", "P18", model=_no_first_memory_gradient_without_state,
    ),
    Sabotage("router noise in evaluation", "P16", given(_noisy)),
    Sabotage("router noise ignored in training", "P1", given(lambda p, state, noise: {"noise": None})),
    Sabotage("temperature ignored", "P1", given(lambda p, state, noise: {"temperature": 1.0})),
    Sabotage("temperature divides the noise alone", "P1", given(_cool_noise)),
    Sabotage("balance bias acts in evaluation", "P13", given(_biased)),
    Sabotage("evaluation moves the balance load", "P13", model=lambda m: _Wrapped(m, "forward", _moved_load)),
)  # fmt: skip
