"""`unisono::mom_gru`, the PyTorch operator around the kernels: how they are launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisono_torch.kernels.mom_gru import native
from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops.mom_gru_loop import Sizes, plain, product
from unisono_torch.ops.transforms import again

SEGMENT = 32  # tokens between saved memories
WARPS, STAGES, ROWS = 8, 1, 8  # a program; rows of a matrix a block
LONGEST = 1 << 20  # tokens a launch: its barriers are counted in 32 bits
WEIGHTS = (
    "Tensor w_x, Tensor x_bias, Tensor w_h, Tensor w_c, Tensor w_candidate, Tensor w_after, Tensor after_bias, Tensor router, "
    "Tensor router_bias, Tensor fresh"
)


def _segment() -> int:
    return 4 if interpreted() else SEGMENT  # the interpreter's tests are of few tokens


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Room:
    """Zeros that a decoded token's kernel leaves as zeros, or as what its next call takes for none."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._made = device, {}

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        if (count, dtype) not in self._made:
            self._made[count, dtype] = torch.zeros(count, dtype=dtype, device=self.device)
        return self._made[count, dtype]


def _launch(
    kernel: str, tensors: dict[str, Tensor | None], sizes: tuple[int, int], length: int, room: Room | None = None, **flags: object
) -> None:
    from unisono_torch.kernels.mom_gru import backward as back
    from unisono_torch.kernels.mom_gru import forward as there

    h, router, w_after = tensors["h"], tensors["router"], tensors["w_after"]
    assert h is not None
    assert router is not None
    assert w_after is not None
    _, batch, width = h.shape
    banks, slots = sizes
    memory, hidden = tensors["fresh"].shape[1], router.shape[1]  # pyright: ignore[reportOptionalMemberAccess]
    after = w_after.shape[1 if kernel == "backward" else 0]

    def size(n: int, least: int = 16) -> int:
        return max(least, 1 << (n - 1).bit_length())

    programs = 1 if interpreted() else _multiprocessors(h.device)
    keep = bool(flags.get("KEEP"))
    if native.launch(kernel, tensors, sizes, programs, _segment(), length, keep, room):
        return
    rows = ROWS
    while -(-width // rows) + -(-(hidden + memory) // rows) + -(-after // rows) > programs > 1 and rows < 32:
        rows *= 2  # one block a program, where they do not get too large
    cuts = 5 if rows == 8 else 2
    function = {"forward": there.forward, "backward": back.backward}[kernel]
    arguments = {
        **tensors,
        **flags,
        "counter": torch.zeros(2, dtype=torch.int32, device=h.device) if room is None else room.zeros(2, torch.int32),
        "T": length,
        "B": batch,
        "D": width,
        "WIDTH": memory,
        "HIDDEN": hidden,
        "BANKS": banks,
        "SLOTS": slots,
        "AFTER": after,
        "HAS_RESET": tensors["reset"] is not None,
        "HAS_VALID": tensors["valid"] is not None,
        "SETTLE": tensors.get("out") is not None,
        "HAS_RESIDUAL": tensors.get("residual") is not None,
        "SEGMENT": _segment(),
        "PROGRAMS": programs,
        "BB": 16 if batch <= 16 or interpreted() else 32,  # whose tests are of few sequences
        "RB": rows,
        "S": min(8, size(-(-width // 16), 1)),
        "SW": min(8, size(-(-memory // 16), 1)),
        "AHEAD": cuts,
        "BW": size(memory),
        "BL": size(slots),
        "BH": size(hidden),
        "BN": size(banks, 1),
    }
    options = {} if interpreted() else {"num_warps": WARPS, "num_stages": STAGES, "launch_cooperative_grid": True}
    function[(programs,)](**{name: arguments[name] for name in function.arg_names}, **options)


def _whole(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if a is None else a.contiguous() for a in tensors)


@torch.library.custom_op(
    "unisono::mom_gru",
    mutates_args=(),
    schema="(Tensor h, Tensor M, Tensor x, Tensor? reset, Tensor? valid, Tensor? drawn, "
    f"{WEIGHTS}, int banks, int slots, float temperature, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _loop(h, M, x, reset, valid, drawn, *rest):
    """The first state and h of each token [T+1, B, D], the last M; and of each token (of one, unless `save`) what the backward wants."""
    found = _loop_fake(h, M, x, reset, valid, drawn, *rest)
    found[0][0] = h
    found[1].copy_(M)
    _run(found, x, reset, valid, drawn, *rest)
    return found


def _run(into, x, reset, valid, drawn, *rest):
    """Into what `_loop` returns, which holds the first h and M."""
    _steps(into, F.linear(x, rest[0], rest[1]), reset, valid, drawn, *rest)


def _steps(into, given, reset, valid, drawn, *rest, settled=(None, None), room=None):
    """As `_run`, of products of x and their bias. settled: of one token, what h' is added to, and where the sum goes."""
    _, _, w_h, w_c, w_candidate, w_after, after_bias, router, router_bias, fresh, banks, slots, temperature, save = rest
    outs, memory, before, rho, c, gates, candidate, later, memories = into
    h, length = outs[0], len(given)
    if drawn is not None:  # (logits + noise) / temperature
        drawn, router, router_bias = drawn / temperature, router / temperature, router_bias / temperature
    names = "given", "drawn", "reset", "valid", "w_h", "w_c", "w_candidate", "w_after", "after_bias", "router", "router_bias", "fresh"
    inputs = given, drawn, reset, valid, w_h, w_c, w_candidate, w_after, after_bias, router, router_bias, fresh
    tensors = dict(zip(names, _whole(*inputs), strict=True))
    kept = {"rho": rho, "c": c, "gates": gates, "candidate": candidate, "later": later, "before": before, "memories": memories}
    tensors |= kept | {"M": memory, "parts": h.new_empty(len(h), banks, fresh.shape[1]), "reads": torch.empty_like(h)}
    tensors |= {"residual": settled[0], "out": settled[1]}
    with torch.cuda.device_of(h):
        for first in range(0, length, LONGEST):
            last = min(first + LONGEST, length)
            some = {name: a if a is None else a[first:last] for name, a in tensors.items() if name in names[:4]}
            if save:
                some |= {name: a[first:last] for name, a in kept.items() if name != "memories"}
                some["memories"] = memories[first // _segment() :]
            some |= {"h": outs[first:]}
            _launch("forward", tensors | some, (banks, slots), last - first, room, HAS_DRAWN=drawn is not None, KEEP=save)


@_loop.register_fake
def _loop_fake(h, M, x, reset, valid, drawn, *rest):
    *_, after_bias, router, _, fresh, banks, _, _, save = rest
    (batch, width), length = h.shape, len(x)
    memory, hidden = fresh.shape[1], router.shape[1]
    shapes = (hidden + memory,), (banks,), (memory,), (2 * width,), (width,), (len(after_bias),)
    kept = (h.new_empty(length if save else 1, batch, *shape) for shape in shapes)
    memories = h.new_empty(-(-length // _segment()) if save else 0, *M.shape)
    return h.new_empty(length + 1, batch, width), torch.empty_like(M, memory_format=torch.contiguous_format), *kept, memories


@torch.library.custom_op(
    "unisono::mom_gru_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor dM, Tensor outs, Tensor before, Tensor rho, Tensor c, Tensor gates, Tensor candidate, Tensor later, "
    f"Tensor memories, Tensor? reset, Tensor? valid, bool drawn, {WEIGHTS}, int banks, int slots, float temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _loop_backward(dout, dM, outs, before, rho, c, gates, candidate, later, memories, reset, valid, drawn, *rest):
    """Gradients of h, M, `given`, of what follows h' [T, B, …], of the router's logits, and of M₀ where it was restored."""
    *weights, banks, slots, temperature = rest
    _, _, w_h, w_c, w_candidate, w_after, _, router, _, fresh = weights
    found = _loop_backward_fake(dout, dM, outs, before, rho, c, gates, candidate, later, memories, reset, valid, drawn, *rest)
    dh, memory, dx, dafter, dlogits, dfresh = found
    memory.copy_(dM)
    dfresh.zero_()
    batch, length = dh.shape[0], len(dout)
    new, width, n = dh.new_empty, dh.shape[1], fresh.shape[1]
    by_bank = dh.new_zeros((batch, *dM.shape[1:]) if reset is not None else (0,))
    tensors = {"h": outs, "dM": memory, "dx": dx, "dafter": dafter, "dlogits": dlogits, "dh": dh, "dfresh": by_bank}
    tensors |= {"before": before, "rho": rho, "gates": gates, "candidate": candidate, "later": later, "memories": memories}
    names = "dout", "reset", "valid", "w_h", "w_c", "w_candidate", "w_after", "router", "fresh"
    router = router / temperature if drawn else router
    turned = w_h.mT, w_c.mT, w_candidate.mT, w_after.mT
    tensors |= dict(zip(names, _whole(dout, reset, valid, *turned, router, fresh), strict=True))
    tensors |= {
        "past": new(_segment(), batch, banks, slots, -(-n // 4) * 4),
        "writes": new(batch, banks, 3 * n),
        "shares": new(batch, banks),
    }
    tensors |= {"queries": new(batch, banks, n), "routes": new(batch, banks), "dc": new(batch, n), "base": new(batch, width)}
    with torch.cuda.device_of(dh):
        _launch("backward", tensors, (banks, slots), length)
    if drawn:
        dlogits /= temperature
    if reset is not None:
        dfresh.copy_(by_bank.sum(0))
    return found


@_loop_backward.register_fake
def _loop_backward_fake(dout, dM, outs, before, rho, c, gates, candidate, later, memories, reset, valid, drawn, *rest):
    fresh, (length, batch, width) = rest[9], dout.shape
    new, known = dout.new_empty, before.shape[-1]
    memory = torch.empty_like(dM, memory_format=torch.contiguous_format)
    dx = new(length, batch, known + 3 * width)
    return new(batch, width), memory, dx, new(later.shape), new(rho.shape), torch.empty_like(fresh, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.sizes, ctx.drawn = inputs[16:19], inputs[5] is not None
    ctx.save_for_backward(*inputs[:16], output[0], *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _gradient(ctx: Any, douts: Tensor, dM: Tensor, *_: Any):
    inputs, (outs, before, rho, c, gates, candidate, later, memories) = ctx.saved_tensors[:16], ctx.saved_tensors[16:]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_plain, (*inputs, *ctx.sizes, True), ctx.needs_input_grad, (douts, dM))
    _, _, x, reset, valid, _, *weights = inputs
    kept = before, rho, c, gates, candidate, later, memories
    call = torch.ops.unisono.mom_gru_backward
    dh, dM, dx, dafter, dlogits, dfresh = call(douts[1:], dM, outs, *kept, reset, valid, ctx.drawn, *weights, *ctx.sizes)
    width, hidden = outs.shape[-1], weights[7].shape[1]
    h = outs[:-1] if reset is None else torch.where(reset[..., None], 0, outs[:-1])
    of_c = dx[..., -3 * width :]
    reads = torch.sigmoid(gates[..., :width]) * h
    return (
        dh + douts[0], dM, dx @ weights[0], None, None, dlogits if ctx.drawn else None, product(dx, x), dx.sum((0, 1)),
        product(dx[..., :-width], h), product(of_c, c), product(dx[..., -width:], reads), product(dafter, outs[1:]),
        dafter.sum((0, 1)), product(dlogits, before[..., :hidden]), dlogits.sum((0, 1)), dfresh, *(None,) * 4,
    )  # fmt: skip


def _plain(h, M, x, reset, valid, drawn, *rest):
    """The same in plain operations, for second derivatives."""
    *weights, banks, slots, temperature, _ = rest
    out, M = plain(h, M, x, reset, valid, drawn, Sizes(banks, slots, temperature), *weights)
    return torch.cat([h[None], out]), M


_loop.register_autograd(_gradient, setup_context=_setup)


def loop(h: Tensor, M: Tensor, x: Tensor, reset: Any, valid: Any, drawn: Any, sizes: Any, weights: Any) -> tuple[Tensor, Tensor]:
    """`plain` of ops/mom_gru_loop.py in float32, of one token and more: h of each token [T, B, D], the last M."""
    save = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (h, M, x, drawn, *weights))
    outs, M, *_ = torch.ops.unisono.mom_gru(h, M, x, reset, valid, drawn, *weights, *sizes, save)
    return outs[1:], M


def advance(
    h: Tensor, M: Tensor, given: Tensor, sizes: Any, weights: Any, residual: Tensor | None, dtype: torch.dtype, room: Room
) -> Tensor:
    """One token of `loop`, without a gradient, of products of x and their bias [B, ·] → h' [B, D] in `dtype`, on residual. h [2, B, D],
    whose first is the state, and M, in one piece, advance in place."""
    rest = *weights, *sizes, False
    _, _, *kept = _loop_fake(h[0], M, given[None], None, None, None, *rest)
    out = torch.empty(h.shape[1:], dtype=dtype, device=h.device)
    _steps((h, M, *kept), given[None], None, None, None, *rest, settled=(residual, out), room=room)
    return out
