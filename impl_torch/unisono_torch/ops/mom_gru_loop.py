"""The time loop of MoM-GRU as one operator for autograd, with a backward written out.

Autograd would record some fifty operations a token, and hold the memory before each. This loop keeps what the gates, keys and
queries of each token were, and the memory before every SEGMENT tokens. The backward makes the memories in between again from the
keys, a segment at a time, and multiplies out the gradients of all weights after its loop, for all tokens at once. On a GPU a
whole segment is one CUDA graph. Where the gradient is to be differentiated in its turn, and under torch.func and forward-mode
differentiation, autograd records every operation after all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unisono_torch.ops.elementwise import sigmoid, tanh
from unisono_torch.ops.graphs import replayed
from unisono_torch.ops.precision import exact
from unisono_torch.ops.transforms import again, transformed

SEGMENT = 32  # tokens of which the backward holds all memories at a time, and which one graph holds


class Weights(NamedTuple):
    """The cell's weights by what they multiply; those of one factor are one matrix."""

    x: Tensor  # [hidden | d_m | 3D, D]: router, query, gates
    x_bias: Tensor
    h: Tensor  # [hidden | d_m | 2D, D]: router, query, r and ζ
    c: Tensor  # [3D, d_m]
    candidate: Tensor  # [D, D], of r∘h
    after: Tensor  # [d_m | d_m | (d_m |) 1, D], of h': key, value, (erase,) gate
    after_bias: Tensor
    router: Tensor
    router_bias: Tensor
    memory: Tensor  # M₀ [n·L, d_m]


class Sizes(NamedTuple):
    banks: int
    slots: int
    temperature: float


class Kept(NamedTuple):
    """What the backward wants of a token [B, …], or of all [T, B, …]. Queries and keys are divided by √d_m."""

    hidden: Tensor
    rho: Tensor
    query: Tensor
    c: Tensor
    gates: Tensor  # r, ζ; these and the rest before σ and tanh
    candidate: Tensor
    key: Tensor
    add: Tensor
    erase: Tensor
    gamma: Tensor


def token(w: Weights, sizes: Sizes, h: Tensor, M: Tensor, x: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor, Kept]:
    """h [B, D], M [B, n·L, d_m], x [B, hidden | d_m | 3D]: the products with x, drawn [B, n]: noise → h', M'."""
    d, width, hidden = h.shape[-1], M.shape[-1], w.router.shape[1]
    scale, known = width**-0.5, hidden + width + 2 * d
    before = torch.addmm(x[:, :known], h, w.h.mT)
    a = before[:, :hidden].relu()
    logits = torch.addmm(w.router_bias, a, w.router.mT)
    rho = (logits if drawn is None else (logits + drawn) / sizes.temperature).softmax(-1)
    query = before[:, hidden : hidden + width] * scale
    c = torch.bmm(_shared(_attention(M, query, sizes), rho)[:, None], M)[:, 0]
    from_c = c @ w.c.mT
    gates = before[:, hidden + width :] + from_c[:, : 2 * d]
    r, zeta = sigmoid(gates).chunk(2, -1)
    candidate = torch.addmm(x[:, known:] + from_c[:, 2 * d :], r * h, w.candidate.mT)
    h = torch.addcmul(zeta * h, sigmoid(-gates[:, d:]), tanh(candidate))  # 1 − ζ keeps its digits
    after = torch.addmm(w.after_bias, h, w.after.mT)
    key, add, erase, gamma = after[:, :width] * scale, after[:, width : 2 * width], after[:, -1 - width : -1], after[:, -1:]
    M = _written(M, _shared(_attention(M, key, sizes), rho * sigmoid(gamma)), tanh(add), sigmoid(erase))
    return h, M, Kept(a, rho, query, c, gates, candidate, key, add, erase, gamma)


def loop(
    w: Weights, sizes: Sizes, h: Tensor, M: Tensor, x: Tensor, reset: Tensor | None, valid: Tensor | None, noise: Tensor | None,
    kernel: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [B, T, D], noise with the balance bias [B, T, n] → h of each token [B, T, D], the last M; with the kernels, where told."""
    x = x.transpose(0, 1)
    reset, valid, noise = (None if a is None else a.transpose(0, 1) for a in (reset, valid, noise))
    if kernel:
        from unisono_torch.kernels.mom_gru import loop as launched

        out, M = launched(h, M, x, reset, valid, noise, sizes, w)
        return out.transpose(0, 1), M
    written = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed()
    out, M = (_Loop.apply if written else plain)(h, M, x, reset, valid, noise, sizes, *w)  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]
    return out.transpose(0, 1), M


def plain(
    h: Tensor, M: Tensor, x: Tensor, reset: Tensor | None, valid: Tensor | None, noise: Tensor | None, sizes: Sizes, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Time comes first: x [T, B, D] → h of each token [T, B, D], the last M."""
    outs, given = [], _given(x, weights)
    for part in _segments(len(given)):
        h, M, out, *_ = _run(part, _forward, (sizes, False), h, M, *_cut(part, given, reset, valid, noise), *weights)
        outs.append(out)
    return torch.cat(outs), M


def _given(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The products with x, which need no loop [T, B, hidden | d_m | 3D]."""
    w = Weights(*weights)
    return F.linear(x, w.x, w.x_bias)


class _Loop(torch.autograd.Function):
    """`plain`, with its way back."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, M: Tensor, x: Tensor, reset: Any, valid: Any, noise: Any, sizes: Sizes, *weights: Tensor):
        h_first, first, outs, kept, memories, given = h, M, [], [], [], _given(x, weights)
        for part in _segments(len(given)):
            memories.append(M)
            h, M, out, *values = _run(part, _forward, (sizes, True), h, M, *_cut(part, given, reset, valid, noise), *weights)
            outs.append(out)
            kept.append(values)
        ctx.sizes, ctx.marks = sizes, (reset, valid)
        out = torch.cat(outs)
        ctx.save_for_backward(h_first, first, x, noise, out, *(torch.cat(of) for of in zip(*kept, strict=True)), *weights, *memories)
        return out, M

    @staticmethod
    @exact
    def backward(ctx: Any, dout: Tensor, dM: Tensor):
        h_first, M_first, x, noise, out, *saved = ctx.saved_tensors
        first, last = len(Kept._fields), len(Kept._fields) + len(Weights._fields)
        if torch.is_grad_enabled():
            return again(plain, (h_first, M_first, x, *ctx.marks, noise, ctx.sizes, *saved[first:last]), ctx.needs_input_grad, (dout, dM))
        kept, w, memories = Kept(*saved[:first]), Weights(*saved[first:last]), saved[last:]
        reset, valid = ctx.marks
        noisy, d = noise is not None, out.shape[-1]
        h = torch.cat([h_first[None], out[:-1]])  # before each token
        if reset is not None:
            h = torch.where(reset[..., None], 0, h)
        dh, dfresh, found = torch.zeros_like(h_first), torch.zeros_like(w.memory), []
        for part, M in reversed(list(zip(_segments(len(out)), memories, strict=True))):
            sequences = _cut(part, dout, reset, valid, h, *kept)
            dh, dM, dfresh, *of_segment = _run(part, _backward, (ctx.sizes, noisy), dh, dM, dfresh, M, *sequences, *w)
            found.append(of_segment)
        dx, dafter, dlogits = (torch.cat(of[::-1]) for of in zip(*found, strict=True))
        of_h, gates = dx[..., :-d], dx[..., -3 * d :]
        weights = (
            product(dx, x), dx.sum((0, 1)),
            product(of_h, h), product(gates, kept.c), product(dx[..., -d:], sigmoid(kept.gates[..., :d]) * h), product(dafter, out),
            dafter.sum((0, 1)), product(dlogits, kept.hidden), dlogits.sum((0, 1)), dfresh,
        )  # fmt: skip
        return dh, dM, dx @ w.x, None, None, dlogits if noisy else None, None, *weights


def _segments(length: int) -> list[slice]:
    return [slice(start, min(start + SEGMENT, length)) for start in range(0, length, SEGMENT)]


def _cut(part: slice, *sequences: Tensor | None) -> list[Tensor | None]:
    return [None if a is None else a[part] for a in sequences]


def _run(part: slice, function: Callable[..., tuple[Tensor, ...]], settings: tuple, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """What is left of a sequence after whole segments may be of any length: it is not worth a graph of its own."""
    return replayed(function, settings, *inputs) if part.stop - part.start == SEGMENT else function(*settings, *inputs)


def _forward(
    sizes: Sizes, keep: bool, h: Tensor, M: Tensor, given: Tensor, reset: Tensor | None, valid: Tensor | None, noise: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A segment: given [S, B, …] → h, M after it, h of each token [S, B, D] and, to keep, what Kept names [S, B, …]."""
    w, out, kept = Weights(*weights), [], []
    for x, cut, read, drawn in _tokens(given, reset, valid, noise):
        h, M = _restored(cut, h, M, w.memory)
        after = token(w, sizes, h, M, x, drawn)
        h, M = _read(read, after[0], h), _read(read, after[1], M)
        out.append(h)
        kept.append(after[2])
    return h, M, torch.stack(out), *((torch.stack(of) for of in zip(*kept, strict=True)) if keep else ())


class _Slopes(NamedTuple):
    """Of σ and tanh, which need no loop: σ(x) σ(−x), since y(1−y) has no digits where y is nearly 1."""

    gates: Tensor
    candidate: Tensor  # times 1 − ζ
    add: Tensor
    erase: Tensor
    gamma: Tensor
    zeta: Tensor
    hidden: Tensor


def _slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _backward(
    sizes: Sizes, noisy: bool, dh: Tensor, dM: Tensor, dfresh: Tensor, M: Tensor, dout: Tensor, reset: Tensor | None,
    valid: Tensor | None, h: Tensor, *others: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A segment that finds M: from dh, dM and dfresh after it to those before it, and the gradients [S, B, …] that `_back` finds."""
    kept, w = Kept(*others[: len(Kept._fields)]), Weights(*others[len(Kept._fields) :])
    r, zeta = sigmoid(kept.gates).chunk(2, -1)
    slopes = _Slopes(
        _slope(kept.gates), 4 * _slope(2 * kept.candidate) * sigmoid(-kept.gates.chunk(2, -1)[1]), 4 * _slope(2 * kept.add),
        _slope(kept.erase), _slope(kept.gamma), h - tanh(kept.candidate), kept.hidden > 0,
    )  # fmt: skip
    kept = kept._replace(add=tanh(kept.add), erase=sigmoid(kept.erase), gamma=sigmoid(kept.gamma))
    past = _memories(w, sizes, M, kept, reset, valid)
    each = zip(past, _tokens(dout, reset, valid, h, r, zeta, *kept, *slopes), strict=True)
    found = []
    for past_t, (do, cut, read, h_t, r_t, zeta_t, *values) in reversed(list(each)):
        dh = dh + do
        mine = (dh, dM) if read is None else (torch.where(read[:, None], dh, 0), torch.where(read[:, None, None], dM, 0))
        of_kept, of_slopes = Kept(*values[: len(kept)]), _Slopes(*values[len(kept) :])
        dh_t, dM_t, gradients = _back(w, sizes, (h_t, r_t, zeta_t, *past_t), of_kept, of_slopes, *mine, noisy)
        dh, dM = _read(read, dh_t, dh), _read(read, dM_t, dM)
        found.append(gradients)
        if cut is not None:
            dfresh = dfresh + torch.where(cut[:, None, None], dM, 0).sum(0)
            dh, dM = torch.where(cut[:, None], 0, dh), torch.where(cut[:, None, None], 0, dM)
    return dh, dM, dfresh, *(torch.stack(of[::-1]) for of in zip(*found, strict=True))


def _memories(
    w: Weights, sizes: Sizes, M: Tensor, kept: Kept, reset: Tensor | None, valid: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each token: the memory that it finds, and where it reads and writes [B, n, L]."""
    found, writes = [], []
    for key, rho, gamma, add, erase, cut, read in _tokens(kept.key, kept.rho, kept.gamma, kept.add, kept.erase, reset, valid):
        _, M = _restored(cut, None, M, w.memory)
        beta = _attention(M, key, sizes)
        found.append(M)
        writes.append(beta)
        M = _read(read, _written(M, _shared(beta, rho * gamma), add, erase), M)
    alpha = torch.matmul(torch.stack(found), kept.query[..., None])[..., 0].unflatten(-1, sizes[:2]).softmax(-1)
    return list(zip(found, alpha.unbind(0), writes, strict=True))


def _back(
    w: Weights, sizes: Sizes, before: Sequence[Tensor], kept: Kept, slopes: _Slopes, dh: Tensor, dM: Tensor, noisy: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """From gradients of h' and M' to those of h and M; and of the products with x, of those with h', and of the router's logits."""
    h, r, zeta, M, alpha, beta = before
    width, scale = M.shape[-1], M.shape[-1] ** -0.5
    # M' = M + w ∘ (a − e ∘ M)
    share = kept.rho * kept.gamma
    weight = _shared(beta, share)  # [B, n·L]
    of_erase = dM * M
    dweight = (torch.bmm(dM, kept.add[..., None]) - torch.bmm(of_erase, kept.erase[..., None])).reshape(beta.shape)
    dadd, derase = torch.bmm(weight[:, None], dM)[:, 0], -torch.bmm(weight[:, None], of_erase)[:, 0]
    dwrites, dshare = _softmax_back(beta, dweight, share)
    dkey = torch.bmm(dwrites[:, None], M)[:, 0] * scale
    drho, dgamma = dshare * kept.gamma, (dshare * kept.rho).sum(-1, keepdim=True)
    dvalue, derase = dadd * slopes.add, derase * slopes.erase
    coupled = len(w.after) == 2 * width + 1
    dafter = torch.cat([dkey, *([dvalue + derase] if coupled else [dvalue, derase]), dgamma * slopes.gamma], -1)
    # h' = h̃ + ζ ∘ (h − h̃)
    dh = torch.addmm(dh, dafter, w.after)
    dcandidate = dh * slopes.candidate
    dproduct = dcandidate @ w.candidate
    dgates = torch.cat([dproduct * h, dh * slopes.zeta], -1) * slopes.gates
    dc = torch.cat([dgates, dcandidate], -1) @ w.c
    # c = Σ ρ α M
    dreads, of_rho = _softmax_back(alpha, torch.bmm(M, dc[..., None]).reshape(alpha.shape), kept.rho)
    dquery = torch.bmm(dreads[:, None], M)[:, 0] * scale
    drho = drho + of_rho
    left = torch.stack([_shared(alpha, kept.rho), dreads, dwrites], -1)
    dM = torch.baddbmm(
        torch.addcmul(dM, weight[..., None] * kept.erase[:, None], dM, value=-1), left, torch.stack([dc, kept.query, kept.key], 1)
    )
    dlogits = kept.rho * (drho - (kept.rho * drho).sum(-1, keepdim=True))
    dlogits = dlogits / sizes.temperature if noisy else dlogits
    dhidden = torch.where(slopes.hidden, dlogits @ w.router, 0)
    of_h = torch.cat([dhidden, dquery, dgates], -1)
    dh = torch.addmm(torch.addcmul(dh * zeta, dproduct, r), of_h, w.h)
    return dh, dM, (torch.cat([of_h, dcandidate], -1), dafter, dlogits)


def _softmax_back(p: Tensor, dp: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Of share ∘ p, where p [B, n, L] is a softmax in each bank: the gradients of its scores [B, n·L] and of the shares [B, n]."""
    weighted = p * dp
    dshare = weighted.sum(-1)
    return _shared(weighted - p * dshare[..., None], share), dshare


def _attention(M: Tensor, key: Tensor, sizes: Sizes) -> Tensor:
    """A softmax in each bank: M [B, n·L, d_m], key [B, d_m] → [B, n, L]."""
    return torch.bmm(M, key[..., None]).reshape(-1, sizes.banks, sizes.slots).softmax(-1)


def _shared(a: Tensor, share: Tensor) -> Tensor:
    """a [B, n, L] times share [B, n] → [B, n·L]."""
    return (a * share[..., None]).flatten(1)


def _written(M: Tensor, weight: Tensor, add: Tensor, erase: Tensor) -> Tensor:
    """M ∘ (1 − w eᵀ) + w aᵀ = M + w ∘ (a − e ∘ M)."""
    return torch.addcmul(M, weight[..., None], torch.addcmul(add[:, None], erase[:, None], M, value=-1))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Σ over tokens of a bᵀ."""
    return a.flatten(0, 1).mT @ b.flatten(0, 1)


def _tokens(first: Tensor, *others: Tensor | None):
    """What belongs to each token, of [S, …]."""
    return zip(first.unbind(0), *([None] * len(first) if a is None else a.unbind(0) for a in others), strict=True)


def _restored(cut: Tensor | None, h: Any, M: Tensor, fresh: Tensor) -> tuple[Any, Tensor]:
    if cut is None:
        return h, M
    return None if h is None else torch.where(cut[:, None], 0, h), torch.where(cut[:, None, None], fresh, M)


def _read(read: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if read is None else torch.where(read.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
