"""Causal softmax attention with a cache of every key and value (Vaswani et al. 2017, eq 1).

Shapes: q, k [B, T, H, K], v [B, T, H, V], reset and valid [B, T] bool or None. State: (keys [B, capacity, H, K],
values [B, capacity, H, V], count [B] int32): the tokens of the sequence by position, zeros from `count` on, float32 or wider.
Each form returns (o [B, T, H, V] in v's dtype, final state). o is 0 where a token is not valid. A sequence longer than the
capacity is an InputError, but where values cannot be read (compiled graphs, torch.func, meta): there its last tokens are not cached.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from unisono_spec.contract import InputError
from unisono_spec.contract.shapes import shaped

from unisono_torch.arrays import readable
from unisono_torch.ops.compact import Compact, segments, take
from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.fold import check_length, fold, masked, restarted
from unisono_torch.ops.graphs import capturing
from unisono_torch.ops.precision import exact
from unisono_torch.ops.transforms import attention

State = tuple[Tensor, Tensor, Tensor]


@exact
def step(q: Tensor, k: Tensor, v: Tensor, state: State, reset: Tensor | None = None, valid: Tensor | None = None) -> tuple[Tensor, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    dtype, out = wide(v.dtype), v.dtype
    keys, values, count = state[0].to(dtype), state[1].to(dtype), state[2]
    if reset is not None:
        (count,) = masked(~reset, count)
    _check_capacity(count, valid, keys.shape[1])
    slot = torch.arange(keys.shape[1], device=q.device)
    keys, values = masked(slot < count[:, None], keys, values)
    q, k, v = (a.to(dtype) for a in masked(valid, q, k, v))
    here = slot == count[:, None]  # [B, capacity]
    if valid is not None:
        here = here & valid[:, None]
    keys, values = (torch.where(here[..., None, None], new[:, None], old) for new, old in ((k, keys), (v, values)))
    count = count + (1 if valid is None else valid.int())
    # the first slot is read even where the sequence is still empty, to have something to divide by
    seen = slot < count.clamp(min=1)[:, None]
    o = attention(q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), seen[:, None, None])
    (o,) = masked(valid, o[:, :, 0].to(out))
    return o, (keys, values, count)


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
    fresh: bool = False,
) -> tuple[Tensor, State]:
    """One masked attention over the cache and all T tokens. A fresh sequence in which no token is reset needs no mask and no cache: its
    valid tokens are moved to its front, where it cannot be seen that they are there.

    fresh: the caller knows that nothing was read before, which a compiled graph cannot see in the state's values.
    """
    use_triton(implementation, "softmax_attention", v.device, v.dtype)
    check_length(q)
    keys, values, count = restarted(reset, initial_state)
    length, capacity, dtype = q.shape[1], keys.shape[1], wide(v.dtype)
    fresh = fresh or (readable(count) and not count.any())
    q, k, v = masked(valid, q, k, v)
    if reset is None and length <= capacity and fresh:
        # valid tokens one behind the other: a causal mask keeps them from all others
        rows = Compact(None if _padded_behind(valid) else valid, q)
        q, k, v = (rows.pack(a) for a in (q, k, v))
        o = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)
        (o,) = masked(valid, rows.unpack(o))
        keys, values = (F.pad(a.to(dtype), (0, 0, 0, 0, 0, capacity - length)) for a in (k, v))
        return o, (keys, values, count + (length if valid is None else valid.sum(1, dtype=count.dtype)))

    segment = segments(reset, q)  # [B, T]
    read = torch.ones_like(segment) if valid is None else valid.long()
    before = read.cumsum(1) - read
    if reset is None:
        index = before + count[:, None]
    else:
        # `starts` holds, by number of resets so far, the count at which that sequence began
        starts = torch.cat([-count.long()[:, None], torch.zeros_like(before)], 1)
        index = before - starts.scatter_add(1, segment * reset, before * reset).gather(1, segment)
    _check_capacity(index, valid, capacity)

    slots = torch.arange(capacity, device=q.device)
    present = slots < count[:, None]  # [B, capacity]
    old = present[:, None] & (segment == 0)[..., None]  # [B, T, capacity]
    row = torch.arange(length, device=q.device)
    new = (segment[:, :, None] == segment[:, None]) & (read[:, None] > 0) & (row <= row[:, None])  # [B, T, T]
    if valid is not None:
        new = new | (~valid[..., None] & (row == row[:, None]))  # something to divide by; its output is masked
    reads = torch.cat([old, new], -1)[:, None]
    all_k, all_v = (torch.cat([a.to(b.dtype), b], 1).transpose(1, 2) for a, b in ((keys, k), (values, v)))
    (o,) = masked(valid, attention(q.transpose(1, 2), all_k, all_v, reads).transpose(1, 2))

    last = segment[:, -1:]
    # each slot takes the token of that position in the last sequence, or keeps what it has
    goes = torch.where((read > 0) & (segment == last) & (index < capacity), index, capacity)
    source = torch.full((q.shape[0], capacity + 1), -1, dtype=torch.long, device=q.device)
    source = source.scatter(1, goes, row.expand_as(goes))[:, :capacity]  # [B, capacity]
    written = (source >= 0)[..., None, None]
    kept = (present & (last == 0))[..., None, None]
    keys, values = (
        torch.where(written, take(new, source.clamp(min=0)).to(dtype), torch.where(kept, old, 0))
        for new, old in ((k, keys.to(dtype)), (v, values.to(dtype)))
    )
    return o, (keys, values, (index[:, -1] + read[:, -1]).int())


def _padded_behind(valid: Tensor | None) -> bool:
    """Whether it can be seen that each token before a valid one is valid, too, so that a causal mask keeps the others from it."""
    return valid is None or (readable(valid) and not capturing(valid) and not (valid[:, 1:] & ~valid[:, :-1]).any())


def _check_capacity(index: Tensor, valid: Tensor | None, capacity: int) -> None:
    if not readable(index) or not index.numel() or capturing(index):
        return
    most = (index if valid is None else torch.where(valid, index, -1)).max().item()
    if most >= capacity:
        raise InputError(f"capacity: token {most + 1} of a sequence, the cache holds {capacity}; give init_state a larger capacity")
