"""Linear attention and its gradients written out over all pairs of tokens in float64, and how far rounding may take a kernel from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from unisono_conformance import numerics

EPS = 1e-6
NAMES = ("o", "S", "z", "dq", "dk", "dv", "dS", "dz", "dtau")
# How often a value is rounded to 16 bits on its way: φ, φ/D, scores or the carried state, o inside δ, and the result itself.
ROUNDINGS = {"o": 3, "S": 1, "z": 1, "dq": 5, "dk": 6, "dv": 5, "dS": 3, "dz": 4, "dtau": 6}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    K: int
    V: int
    dtype: torch.dtype
    feature_map: str
    reset: bool = False
    valid: bool = False
    segments: bool = False  # whether time is cut
    packed: bool = False  # whether q, k and v are slices of one tensor, and do lies head by head

    def __str__(self) -> str:
        marks = "".join(f"-{name}" for name in ("reset", "valid", "segments", "packed") if getattr(self, name))
        shape = f"{self.batch}x{self.length}x{self.heads}x{self.K}x{self.V}"
        return f"{shape}-{str(self.dtype)[6:]}-{self.feature_map}{marks}"


def inputs(case: Case, device: str, seed: int = 0) -> dict[str, Any]:
    """q, k, v, S, z, tau, reset, valid and the cotangents do, dS, dz. Tokens that are not valid hold NaN."""
    made = torch.Generator().manual_seed(seed)
    tokens, heads = (case.batch, case.length), case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    q, k, v, do = (normal(*tokens, heads, width) for width in (case.K, case.K, case.V, case.V))
    q[:, ::2, :, 0] = k[:, ::2, :, 0] = 0  # where slopes jump
    size = 1.0
    if case.feature_map == "none":
        # denominators about as small as ε; the slopes that come of that are beyond float16
        size = 1.0 if case.dtype == torch.float16 else 1e-3
        q, k = size * q.abs(), size * k.abs()
    valid = torch.rand(tokens, generator=made) < 0.8 if case.valid else None
    if valid is not None:
        q, k, v = (torch.where(valid[..., None, None], a, math.nan) for a in (q, k, v))
    q, k, v, do = (a.to(case.dtype) for a in (q, k, v, do))
    if case.packed:
        q, k, v = torch.cat([a.flatten(2) for a in (q, k, v)], -1).split((heads * case.K, heads * case.K, heads * case.V), -1)
        q, k, v = q.unflatten(-1, (heads, -1)), k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))
        do = do.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    state = case.batch, heads, case.K
    z = 2 * size * normal(*state).abs()
    if case.feature_map == "taylor2":  # what three keys leave, and what nobody reads: a square's other half with a minus
        state = case.batch, heads, 1 + case.K + case.K**2
        z = _phi("taylor2", normal(case.batch, 3, heads, case.K), 1.0)[0].sum(1)
        noise = normal(case.batch, heads, case.K, case.K)
        z[..., case.K + 1 :] += (noise - noise.mT).flatten(-2)
    reset = torch.rand(tokens, generator=made) < 0.1
    if case.length >= 64:  # seldom: most segments have none, some only before their last chunk
        reset = (torch.arange(case.length) + 13 * torch.arange(case.batch)[:, None]) % 97 == 5
    tensors = {
        "q": q, "k": k, "v": v, "S": normal(*state, case.V).float(), "z": z.float(),
        "tau": torch.tensor([1.3]) if case.feature_map == "learned" else None,
        "reset": reset if case.reset else None, "valid": valid,
        "do": do, "dS": normal(*state, case.V).float(), "dz": normal(*state).float(),
    }  # fmt: skip
    return {name: None if a is None else a.to(device) for name, a in tensors.items()}


def _phi(name: str, x: Tensor, tau: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """φ(x), and what makes a gradient by τx of one by φ."""
    if name == "taylor2":
        K = x.shape[-1]
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2 * K) ** 0.5

        def back(g: Tensor) -> Tensor:
            g_x, g_square = g[..., 1 : K + 1], g[..., K + 1 :].unflatten(-1, (K, K))
            return g_x / K**0.25 + ((g_square + g_square.mT) @ x[..., None])[..., 0] / (2 * K) ** 0.5

        return torch.cat([torch.ones_like(x[..., :1]), x / K**0.25, square], -1), back
    if name == "relu":
        return x.clamp(min=0), lambda g: g * (x > 0)
    if name == "none":
        return x, lambda g: g
    return torch.where(x > 0, tau * x + 1, (tau * x).exp()), lambda g: g * (tau * x).clamp(max=0).exp()


def written_out(case: Case, given: dict[str, Any], sign: float = 1.0) -> dict[str, Tensor]:
    """By NAMES. With a sign of −1, of absolute values: what is subtracted is added, so that each result is the sum of its terms."""
    reset, valid = given["reset"], given["valid"]
    ones = torch.ones(case.batch, case.length, dtype=torch.bool, device=given["q"].device)
    valid = ones if valid is None else valid
    segment = (~ones if reset is None else reset).long().cumsum(1)
    live = valid[..., None, None]
    x = {name: torch.where(live, given[name], 0).double() for name in ("q", "k", "v", "do")}
    S, z, dS, dz = (given[name].double() for name in ("S", "z", "dS", "dz"))
    if sign < 0:
        x["v"], x["do"], S, dS, dz = (a.abs() for a in (x["v"], x["do"], S, dS, dz))
    tau = 1.0 if given["tau"] is None else float(given["tau"])
    (q, back_q), (k, back_k) = (_phi(case.feature_map, x[name], tau) for name in "qk")
    q, k, v, do = q * live, k * live, x["v"], x["do"]
    reads = (segment[:, :, None] == segment[:, None, :]).tril().double()
    first, last = ((segment == edge).double()[..., None, None] for edge in (torch.zeros_like(segment), segment[:, -1:]))
    kept = (segment[:, -1] == 0).double()[:, None, None]

    P = torch.einsum("bthk,bjhk,btj->bhtj", q, k, reads)
    D = (P.sum(-1).transpose(1, 2) + (first * q * z[:, None]).sum(-1))[..., None] + EPS  # [B, T, H, 1]
    if sign < 0 and case.feature_map == "taylor2":
        # D, too, is a sum of terms of both signs: a quotient errs by as much more as they are more than it
        q, k, z = q.abs(), k.abs(), z.abs()
        P = torch.einsum("bthk,bjhk,btj->bhtj", q, k, reads)
        D = D.square() / ((P.sum(-1).transpose(1, 2) + (first * q * z[:, None]).sum(-1))[..., None] + EPS)
        back_q, back_k = (_phi("taylor2", x[name].abs(), tau)[1] for name in "qk")
    o = (torch.einsum("bhtj,bjhv->bthv", P, v) + torch.einsum("bthk,bhkv->bthv", first * q, S)) / D
    delta = sign * (do * o).sum(-1, keepdim=True)  # [B, T, H, 1]
    R = torch.einsum("bthv,bjhv,btj->bhtj", do, v, reads) - delta.transpose(1, 2) * reads[:, None]
    share = q / D
    dq = (torch.einsum("bhtj,bjhk->bthk", R, k) + first * (torch.einsum("bthv,bhkv->bthk", do, S) - delta * z[:, None])) / D
    dk = torch.einsum("bhtj,bthk->bjhk", R, share) + last * (torch.einsum("bjhv,bhkv->bjhk", v, dS) + dz[:, None])
    dv = torch.einsum("bhtj,bthv->bjhv", P, do / D) + torch.einsum("bjhk,bhkv->bjhv", last * k, dS)
    dq, dk, dv = back_q(dq) * live, back_k(dk) * live, dv * live
    weight = x if sign > 0 else {name: a.abs() for name, a in x.items()}
    return {
        "o": o,
        "S": torch.einsum("bthk,bthv->bhkv", last * k, v) + kept[..., None] * S,
        "z": (last * k).sum(1) + kept * z,
        "dq": tau * dq, "dk": tau * dk, "dv": dv,
        "dS": torch.einsum("bthk,bthv->bhkv", first * share, do) + kept[..., None] * dS,
        "dz": -(first * share * delta).sum(1) + kept * dz,
        "dtau": (dq * weight["q"]).sum()[None] + (dk * weight["k"]).sum()[None],
    }  # fmt: skip


def budget(case: Case, name: str, terms: Tensor) -> Tensor:
    """How far `name` may lie from the exact one, given the sum of its terms' absolute values."""
    dtype = str(case.dtype).removeprefix("torch.")
    length = case.batch * case.heads * case.length * case.K if name == "dtau" else case.length
    # a gradient by taylor2's features is rounded once more on its way to x
    roundings = ROUNDINGS[name] + (case.feature_map == "taylor2" and name in ("dq", "dk"))
    factor = numerics.formula(dtype, length, roundings, gradient=name.startswith("d"))
    return factor * terms.abs() + numerics.TINY[dtype]
