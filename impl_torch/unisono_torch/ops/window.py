"""Sliding-window attention: causal softmax over the last w tokens of the sequence, the present one included, scaled by 1/√K.

Shapes: q, k [B, T, H, K], v [B, T, H, V], reset and valid [B, T] bool or None. State: (keys [B, w, H, K], values [B, w, H, V],
count [B] int32): the last w keys and values, oldest first, so that the newest is always last and slots not yet filled are
zeros in front; and how many tokens the sequence has held. The state is float32 or wider. Each form returns
(o [B, T, H, V] in v's dtype, final state). o is 0 where a token is not valid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from unisono_spec.contract.shapes import shaped

from unisono_torch.ops.compact import Compact, segments, take
from unisono_torch.ops.dispatch import shorter, use_triton
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.fold import fold, masked, restarted
from unisono_torch.ops.precision import exact
from unisono_torch.ops.recurrence import chunks
from unisono_torch.ops.transforms import attention

State = tuple[Tensor, Tensor, Tensor]


@exact
def step(q: Tensor, k: Tensor, v: Tensor, state: State, reset: Tensor | None = None, valid: Tensor | None = None) -> tuple[Tensor, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    dtype, out = wide(v.dtype), v.dtype
    keys, values, count = state[0].to(dtype), state[1].to(dtype), state[2]
    if reset is not None:
        (count,) = masked(~reset, count)
    w = keys.shape[1]
    slots = torch.arange(w, device=q.device)
    keys, values = masked(slots >= w - count[:, None], keys, values)
    old = keys, values, count
    q, k, v = (a.to(dtype) for a in masked(valid, q, k, v))
    keys, values = torch.cat([keys[:, 1:], k[:, None]], 1), torch.cat([values[:, 1:], v[:, None]], 1)
    count = count + 1
    filled = slots >= w - count[:, None]  # [B, w]
    o = attention(q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), filled[:, None, None])
    o = o[:, :, 0].to(out)
    if valid is None:
        return o, (keys, values, count)
    mask = valid[:, None, None, None]
    kept = torch.where(mask, keys, old[0]), torch.where(mask, values, old[1]), torch.where(valid, count, old[2])
    return torch.where(valid[:, None, None], o, 0), kept


@shaped
@exact
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, initial_state: State, reset: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(step, (q, k, v), initial_state, reset, valid)


@shaped
@exact
def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, State]:
    """A banded mask over the C valid tokens of a chunk and the w before them, or a kernel. Chunks are w tokens long at least: shorter
    ones would copy each key more often than twice."""
    dtype = wide(v.dtype)
    keys, values, count = initial_state = restarted(reset, initial_state)
    w = keys.shape[1]
    compact, segment = Compact(valid, q), segments(reset, q)
    now = compact.pack(segment)  # [B, T]
    q, k, v = (compact.pack(a) for a in (q, k, v))
    if use_triton(implementation, "window", v.device, v.dtype, {"K": q.shape[-1], "V": v.shape[-1]}):
        from unisono_torch.kernels.window import window as kernel

        o = kernel(q.to(v.dtype), k.to(v.dtype), v, keys, values, count, None if reset is None else now.int())
        if reset is None and valid is None:
            return o, _newest(k, v, initial_state, dtype)
    else:
        o = banded(q, k, v, initial_state, now, chunk_size)

    slots = torch.arange(w, device=q.device)
    owner = _owners(count, now, w)
    newest = compact.read[:, None] + slots  # [B, w]
    kept = take(owner, newest) == segment[:, -1:]
    keys, values = masked(kept, *(_of_both(old.to(dtype), new, newest) for old, new in ((keys, k), (values, v))))
    held = ((now == segment[:, -1:]) & compact.present).sum(1)
    count = held + torch.where(segment[:, -1] == 0, count, 0)
    return compact.unpack(o), (keys, values, count.int())


def banded(q: Tensor, k: Tensor, v: Tensor, state: State, segment: Tensor | None, chunk_size: int = 64) -> Tensor:
    """o of tokens that are all valid, segment [B, T]: how many resets came up to each. By a banded mask, in chunks."""
    keys, values, count = state
    length, w = q.shape[1], keys.shape[1]
    now = segments(None, q) if segment is None else segment
    owner = _owners(count, now, w)
    size = shorter(max(chunk_size, w), length)
    queries = chunks(q, size).transpose(2, 3)  # [B, N, H, C, K]
    number = queries.shape[1]
    behind = number * size - length
    band_k, band_v = (_bands(old, new.to(q.dtype), behind, size) for old, new in ((keys, k), (values, v)))
    row, column = torch.arange(size, device=q.device)[:, None], torch.arange(w + size, device=q.device)
    band = (column > row) & (column <= row + w)  # [C, w+C]
    reads = F.pad(owner, (0, behind)).unfold(1, w + size, size)[:, :, None] == chunks(now, size)[..., None]
    o = attention(  # a token always reads itself, so that no row is empty
        queries.flatten(0, 1), band_k.flatten(0, 1), band_v.flatten(0, 1), (band & reads).flatten(0, 1)[:, None]
    )
    return o.unflatten(0, (q.shape[0], number)).transpose(2, 3).flatten(1, 2)[:, :length]


def _newest(k: Tensor, v: Tensor, state: State, dtype: torch.dtype) -> State:
    """The state after tokens that are all of one sequence."""
    *old, count = state
    w, count = old[0].shape[1], count + k.shape[1]
    filled = torch.arange(w, device=k.device) >= w - count[:, None]
    keys, values = (torch.cat([a.to(dtype), b[:, -w:].to(dtype)], 1)[:, -w:] for a, b in zip(old, (k, v), strict=True))
    keys, values = masked(filled, keys, values)
    return keys, values, count


def _owners(count: Tensor, now: Tensor, w: int) -> Tensor:
    """The segment of each of the w carried keys and of those of `now` [B, T]: [B, w+T]; −1: an empty slot."""
    slots = torch.arange(w, device=now.device)
    return torch.cat([torch.where(slots >= w - count[:, None], 0, -1), now], 1)


def _bands(old: Tensor, new: Tensor, behind: int, size: int) -> Tensor:
    """What each chunk of `size` tokens reads of old [B, w, H, ·] and new [B, T, H, ·]: [B, N, H, w+C, ·], in new's dtype."""
    w = old.shape[1]
    all_of_them = torch.cat([old.to(new.dtype), new, new.new_zeros(new.shape[0], behind, *new.shape[2:])], 1)
    return all_of_them.unfold(1, w + size, size).mT


def _of_both(old: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """old [B, w, …] and behind it new [B, T, …] at index [B, S], in old's dtype: a slot that stays keeps its bits."""
    w = old.shape[1]
    from_new = (index >= w)[..., None, None]
    return torch.where(from_new, take(new, (index - w).clamp(min=0)).to(old.dtype), take(old, index.clamp(max=w - 1)))
