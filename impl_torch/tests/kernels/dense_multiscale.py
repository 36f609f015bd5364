"""Multi-scale attention written out over all pairs of tokens in float64, and how far rounding may take a kernel from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from unisono_conformance import numerics

EPS = 1e-6
# How often a value is rounded to 16 bits on its way (unisono_conformance/cases/multiscale.py has the reasons); a final S's terms once.
ROUNDINGS = {"o": 3, "S": 1, "z": 0, "q": 4, "k": 4, "v": 3, "q_norm": 4, "k_norm": 4, "log_decay": 3, "weight": 2, "dS": 1, "dz": 2}
NAMES = ("q", "k", "v", "q_norm", "k_norm", "log_decay", "weight", "dS", "dz")  # of gradients; the last two of the initial state


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    K: int
    V: int
    scales: int
    dtype: torch.dtype
    same: bool = True  # whether the normaliser's q and k are the numerator's
    data: bool = False  # whether each token decays in its own way
    gates: str = "token"  # one weight for each "token", "head" or "channel"
    reset: bool = False
    valid: bool = False
    pieces: bool = False  # whether time is cut
    fast: bool = False  # decays that take a number out of its range within a segment
    packed: bool = False  # whether q, k and v are slices of one tensor, and do and q_norm lie head by head
    chunk: int = 16  # tokens C, in the interpreter; short ones leave several segments to each of several pieces
    trend: bool = False  # whether values turn from −1 to 1 midway, and do is about 1: gradients' terms add up
    fixed: bool = False  # whether log λ is given no gradient, nor a weight that heads share
    old: bool = False  # whether o comes nearly of the initial state alone, and gradients of o alone

    def __str__(self) -> str:
        flags = ("same", "data", "reset", "valid", "pieces", "fast", "packed", "trend", "fixed", "old")
        marks = "".join(f"-{n}" for n in flags if getattr(self, n))
        shape = "x".join(map(str, (self.batch, self.length, self.heads, self.K, self.V, self.scales)))
        return f"{shape}-{str(self.dtype)[6:]}-{self.gates}{marks}{'' if self.chunk == 16 else f'-C{self.chunk}'}"

    @property
    def still(self) -> set[str]:
        """What is given no gradient."""
        return ({"log_decay"} | ({"weight"} if self.gates == "token" else set())) if self.fixed else set()


def inputs(case: Case, device: str, seed: int = 0) -> dict[str, Any]:
    """The op's arguments and cotangents do, dS, dz. Tokens that are not valid hold NaN."""
    made = torch.Generator().manual_seed(seed)
    tokens, heads, M = (case.batch, case.length), case.heads, case.scales

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    def feature() -> Tensor:
        x = normal(*tokens, heads, case.K)
        return torch.where(x > 0, x + 1, x.exp())

    q_norm, k_norm, v, do = feature(), feature(), normal(*tokens, heads, case.V), normal(*tokens, heads, case.V)
    if case.trend:
        late = (torch.arange(case.length) >= case.length // 2)[None, :, None, None]
        v, do = torch.where(late, 1 + v / 4, -1 + v / 4), 1 + do / 4
    q, k = (q_norm, k_norm) if case.same else (normal(*tokens, heads, case.K), normal(*tokens, heads, case.K))
    log_decay = -torch.exp(normal(*(tokens if case.data else (1, 1)), M) - 2) * (200 if case.fast else 1)
    if M > 1:
        log_decay[..., 0] = 0
    gates = {"token": (1, 1), "head": (heads, 1), "channel": (heads, case.V)}[case.gates]
    weight = torch.rand(*tokens, M, *gates, generator=made, dtype=torch.float64) + 0.1
    valid = torch.rand(tokens, generator=made) < 0.8 if case.valid else None
    if valid is not None:
        q, k, v, q_norm, k_norm, weight = (
            torch.where(valid.reshape(*tokens, *(1,) * (a.ndim - 2)), a, math.nan) for a in (q, k, v, q_norm, k_norm, weight)
        )
        log_decay = torch.where(valid[..., None], log_decay, math.nan) if case.data else log_decay
    q, k, v, q_norm, k_norm, do = (a.to(case.dtype) for a in (q, k, v, q_norm, k_norm, do))
    if case.packed:
        rows = torch.cat([a.flatten(2) for a in (q, k, v)], -1).split((heads * case.K, heads * case.K, heads * case.V), -1)
        q, beside, v = (a.unflatten(-1, (heads, -1)) for a in rows)
        k = beside if case.same else k  # strides of its own
        do, q_norm = (a.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) for a in (do, q_norm))
    state = case.batch, M, heads, case.K
    tensors = {
        "q": q, "k": k, "v": v, "q_norm": None if case.same else q_norm, "k_norm": None if case.same else k_norm,
        "log_decay": log_decay.float(), "weight": weight.float(),
        "S": normal(*state, case.V).float(), "z": (2 * normal(*state).abs()).float(),
        "reset": torch.rand(tokens, generator=made) < 0.1 if case.reset else None, "valid": valid,
        "do": do, "dS": normal(*state, case.V).float(), "dz": normal(*state).float(),
    }  # fmt: skip
    if case.packed:  # other arrays lie as nothing else does
        tensors |= {name: tensors[name].mT.contiguous().mT for name in ("S", "z", "dS", "dz")}
        valid = tensors["valid"]
        tensors["valid"] = None if valid is None else torch.stack([~valid, valid], -1)[..., 1]
    if case.trend:  # or log λ's gradient would be that of the final state
        tensors |= {name: tensors[name] / 512 for name in ("dS", "dz")}
    if case.old:
        tensors |= {"S": 1024 * tensors["S"].abs(), "do": do.abs(), **{name: 0 * tensors[name] for name in ("dS", "dz")}}
    return {name: None if a is None else a.to(device) for name, a in tensors.items()}


def written_out(case: Case, given: dict[str, Any], terms: bool = False) -> dict[str, Tensor]:
    """o, S, z and the gradients by NAMES. terms: of absolute values, and what is subtracted is added: the sums of the terms."""
    live = torch.ones(case.batch, case.length, dtype=torch.bool, device=given["q"].device)
    segment = (~live if given["reset"] is None else given["reset"]).long().cumsum(1)
    live = live if given["valid"] is None else given["valid"]
    leaves = {}
    for name in ("q", "k", "v", "q_norm", "k_norm", "log_decay", "weight", "S", "z"):
        if (a := given[name]) is not None:
            a = a.double().nan_to_num(0.0)
            leaves[name] = (a.abs() if terms and name != "log_decay" else a).requires_grad_()
    masked = {n: torch.where(live.reshape(*live.shape, *(1,) * (a.ndim - 2)), a, 0) for n, a in leaves.items() if n not in "Sz"}
    q, k, v, c, S, z = *(masked[n] for n in ("q", "k", "v", "weight")), leaves["S"], leaves["z"]
    q_norm, k_norm = (masked.get(f"{n}_norm", masked[n]) for n in "qk")
    log_decay = masked["log_decay"].expand(case.batch, case.length, -1)
    total = log_decay.cumsum(1)  # [B, T, M]
    reads = (segment[:, :, None] == segment[:, None]).tril()[..., None]
    # summed over each pair's own tokens, so that none has a gradient by a pair that it is not between
    later = torch.ones(case.length, case.length, dtype=torch.bool, device=live.device).tril(-1)[None, ..., None]
    between = torch.where(later, log_decay[:, :, None], 0).cumsum(1)
    decay = between.masked_fill(~reads, -math.inf).exp()  # [B, T, T, M]
    kept = total.masked_fill((segment > 0)[..., None], -math.inf).exp()
    N = torch.einsum("btjm,bthk,bjhk,bjhv->btmhv", decay, q, k, v) + torch.einsum("btm,bthk,bmhkv->btmhv", kept, q, S)
    D = torch.einsum("btjm,bthk,bjhk->btmh", decay, q_norm, k_norm) + torch.einsum("btm,bthk,bmhk->btmh", kept, q_norm, z)
    D = D[..., None]
    if terms:
        size = D.detach() + EPS
        o = (c * (N / size + N.detach() * D / size**2)).sum(2)
    else:
        o = (c * (N / (D + EPS))).sum(2)
    last, whole = decay[:, -1], kept[:, -1]
    S_end = torch.einsum("bjm,bjhk,bjhv->bmhkv", last, k, v) + whole[..., None, None, None] * S
    z_end = torch.einsum("bjm,bjhk->bmhk", last, k_norm) + whole[..., None, None] * z
    cotangents = [given[n].double().abs() if terms else given[n].double() for n in ("do", "dS", "dz")]
    found = torch.autograd.grad([o, S_end, z_end], list(leaves.values()), cotangents)
    names = [{"S": "dS", "z": "dz"}.get(str(n), str(n)) for n in leaves]
    return {"o": o.detach(), "S": S_end.detach(), "z": z_end.detach(), **dict(zip(names, found, strict=True))}


def budget(case: Case, name: str, terms: Tensor) -> Tensor:
    """How far `name` may lie from the exact one, given the sum of its terms' absolute values."""
    dtype = str(case.dtype).removeprefix("torch.")
    roundings, summed = ROUNDINGS[name], case.length
    if case.gates == "channel" and name not in ("S", "z"):  # a pass a scale: each rounds o, what comes back, and sums of gradients
        roundings += 1 if name == "o" else 2
    if name == "log_decay" and not case.data:
        summed *= case.batch * case.heads
    factor = numerics.formula(dtype, summed, roundings, gradient=name in NAMES)
    return factor * terms.abs() + numerics.TINY[dtype]
