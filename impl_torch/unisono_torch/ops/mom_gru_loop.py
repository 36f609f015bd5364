"""The time loop of MoM-GRU as one operator for autograd, with a backward written out.

Autograd would record some fifty operations a token, and hold the memory before each. This loop keeps what the gates, keys and
queries of each token were, and the memory before every SEGMENT tokens. The backward makes the memories in between again from the
keys, a segment at a time, and multiplies out the gradients of all weights after its loop, for all tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SEGMENT = 32  # tokens of which the backward holds all memories at a time


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
    gates: Tensor  # r, ζ
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
    gates = torch.sigmoid(before[:, hidden + width :] + from_c[:, : 2 * d])
    r, zeta = gates.chunk(2, -1)
    candidate = torch.tanh(torch.addmm(x[:, known:] + from_c[:, 2 * d :], r * h, w.candidate.mT))
    h = torch.lerp(candidate, h, zeta)
    after = torch.addmm(w.after_bias, h, w.after.mT)
    key, add = after[:, :width] * scale, torch.tanh(after[:, width : 2 * width])
    erase, gamma = torch.sigmoid(after[:, -1 - width : -1]), torch.sigmoid(after[:, -1:])
    M = _written(M, _shared(_attention(M, key, sizes), rho * gamma), add, erase)
    return h, M, Kept(a, rho, query, c, gates, candidate, key, add, erase, gamma)


def loop(
    w: Weights, sizes: Sizes, h: Tensor, M: Tensor, given: Tensor, reset: Tensor | None, valid: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """given [B, T, hidden | d_m | 3D], noise with the balance bias [B, T, n] → h of each token [B, T, D], the last M."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Loop.apply(h, M, given, reset, valid, noise, sizes, *w)  # pyright: ignore[reportReturnType]
    out = []
    for x, cut, read, drawn in _tokens(given, reset, valid, noise):
        h, M = _restored(cut, h, M, w.memory)
        after = token(w, sizes, h, M, x, drawn)
        h, M = _read(read, after[0], h), _read(read, after[1], M)
        out.append(h)
    return torch.stack(out, 1), M


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, M: Tensor, given: Tensor, reset: Any, valid: Any, noise: Any, sizes: Sizes, *weights: Tensor):
        w, h_first = Weights(*weights), h
        out, kept, memories = [], [], []
        for t, (x, cut, read, drawn) in enumerate(_tokens(given, reset, valid, noise)):
            if t % SEGMENT == 0:
                memories.append(M)
            h, M = _restored(cut, h, M, w.memory)
            after = token(w, sizes, h, M, x, drawn)
            h, M = _read(read, after[0], h), _read(read, after[1], M)
            out.append(h)
            kept.append(after[2])
        ctx.sizes, ctx.marks = sizes, (reset, valid, noise is not None)
        every = Kept(*(torch.stack(of) for of in zip(*kept, strict=True)))
        out = torch.stack(out)
        ctx.save_for_backward(h_first, out, torch.stack(memories), *every, *weights)
        return out.transpose(0, 1), M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dM: Tensor):
        h_first, out, memories, *saved = ctx.saved_tensors
        kept, w, sizes = Kept(*saved[: len(Kept._fields)]), Weights(*saved[len(Kept._fields) :]), ctx.sizes
        reset, valid, noisy = ctx.marks
        length, d = len(out), out.shape[-1]
        h = torch.cat([h_first[None], out[:-1]])  # before each token
        if reset is not None:
            h = torch.where(reset.mT[..., None], 0, h)
        r, zeta = kept.gates.chunk(2, -1)
        # what needs no loop: the slopes of σ and tanh
        slopes = _Slopes(
            kept.gates * (1 - kept.gates), 1 - kept.candidate.square(), 1 - kept.add.square(), kept.erase * (1 - kept.erase),
            kept.gamma * (1 - kept.gamma), h - kept.candidate, kept.hidden > 0,
        )  # fmt: skip
        each = list(zip(*(a.unbind(0) for a in (h, r, zeta, *kept, *slopes)), strict=True))
        cuts, reads = ([None] * length if m is None else m.unbind(1) for m in (reset, valid))
        dh, dfresh = torch.zeros_like(h_first), torch.zeros_like(w.memory)
        found: list[Any] = [None] * length
        for start in reversed(range(0, length, SEGMENT)):
            part = range(start, min(start + SEGMENT, length))
            past = _memories(w, sizes, memories[start // SEGMENT], kept, reset, valid, part)
            for t in reversed(part):
                cut, read = cuts[t], reads[t]
                h_t, r_t, zeta_t, *values = each[t]
                dh = dh + dout[:, t]
                mine = (dh, dM) if read is None else (torch.where(read[:, None], dh, 0), torch.where(read[:, None, None], dM, 0))
                before = (h_t, r_t, zeta_t, *past[t - start])
                dh_t, dM_t, found[t] = _back(w, sizes, before, Kept(*values[:10]), _Slopes(*values[10:]), *mine, noisy)
                dh, dM = _read(read, dh_t, dh), _read(read, dM_t, dM)
                if cut is not None:
                    dfresh = dfresh + torch.where(cut[:, None, None], dM, 0).sum(0)
                    dh, dM = torch.where(cut[:, None], 0, dh), torch.where(cut[:, None, None], 0, dM)
        dx, dafter, dlogits = (torch.stack(of) for of in zip(*found, strict=True))
        of_h, gates = dx[..., :-d], dx[..., -3 * d :]
        weights = (
            _product(of_h, h), _product(gates, kept.c), _product(dx[..., -d:], r * h), _product(dafter, out), dafter.sum((0, 1)),
            _product(dlogits, kept.hidden), dlogits.sum((0, 1)), dfresh,
        )  # fmt: skip
        # of x, whose products are given, there are none
        return dh, dM, dx.transpose(0, 1), None, None, dlogits.transpose(0, 1) if noisy else None, None, None, None, *weights


class _Slopes(NamedTuple):
    gates: Tensor
    candidate: Tensor
    add: Tensor
    erase: Tensor
    gamma: Tensor
    zeta: Tensor
    hidden: Tensor


def _memories(
    w: Weights, sizes: Sizes, M: Tensor, kept: Kept, reset: Tensor | None, valid: Tensor | None, part: range
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each token of `part`: the memory that it finds, and where it reads and writes [B, n, L]."""
    found, writes = [], []
    for t in part:
        cut, read = (None if m is None else m[:, t] for m in (reset, valid))
        _, M = _restored(cut, None, M, w.memory)
        beta = _attention(M, kept.key[t], sizes)
        found.append(M)
        writes.append(beta)
        M = _read(read, _written(M, _shared(beta, kept.rho[t] * kept.gamma[t]), kept.add[t], kept.erase[t]), M)
    every = torch.stack(found)
    alpha = torch.matmul(every, kept.query[part.start : part.stop, ..., None])[..., 0].unflatten(-1, sizes[:2]).softmax(-1)
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
    dcandidate = dh * (1 - zeta) * slopes.candidate
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


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Σ over tokens of a bᵀ."""
    return a.flatten(0, 1).mT @ b.flatten(0, 1)


def _tokens(given: Tensor, *marks: Tensor | None):
    return zip(given.unbind(1), *([None] * given.shape[1] if m is None else m.unbind(1) for m in marks), strict=True)


def _restored(cut: Tensor | None, h: Any, M: Tensor, fresh: Tensor) -> tuple[Any, Tensor]:
    if cut is None:
        return h, M
    return None if h is None else torch.where(cut[:, None], 0, h), torch.where(cut[:, None, None], fresh, M)


def _read(read: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if read is None else torch.where(read.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
