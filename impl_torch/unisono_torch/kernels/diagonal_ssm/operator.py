"""`unisono::diagonal_ssm`, the PyTorch operator around the kernels: how they are launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.kernels.diagonal_ssm import products
from unisono_torch.kernels.registry import FLOATS, interpreted
from unisono_torch.ops.precision import uncast
from unisono_torch.ops.transforms import again

TILE = 32  # tokens between saved states
GROUP = 8  # tokens whose states a thread holds at once
BYTES = 16 * 32 * 4  # of a program's states, real or imaginary: four float32 a thread, since of more GROUP tokens' do not fit its registers


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tile() -> int:
    return 8 if interpreted() else TILE  # the interpreter pays by the operation


def _launch(kernel: str, u: Tensor, pairs: int, tensors: dict[str, Tensor | None], **flags: object) -> None:
    import triton
    import triton.language as tl

    from unisono_torch.kernels.diagonal_ssm import sweep

    batch, length, width = u.shape
    function = getattr(sweep, kernel)
    acc, room = accumulator(u.dtype), max(8, triton.next_power_of_2(pairs))
    rows = max(1, min(16, BYTES // (room * acc.itemsize)))
    arguments = {
        **tensors,
        **flags,
        "u": u,
        "T": length,
        "count": -(-length // _tile()),
        "U_ROW": u.stride(1),
        "DIM": width,
        "P": pairs,
        "HAS_RESET": tensors["reset"] is not None,
        "HAS_VALID": tensors["valid"] is not None,
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        "ROWS": rows,
        "BP": room,
        "GROUP": 4 if interpreted() else GROUP,
        "TILE": _tile(),
    }
    function[(batch * -(-width // rows),)](**{name: arguments[name] for name in function.arg_names}, num_warps=4)


def _apart(a: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D, P, 2] → [..., 2, D, P], as the kernels hold complex numbers."""
    return a.to(dtype).movedim(-1, -3).contiguous()


def _beside(a: Tensor) -> Tensor:
    """`_apart` undone."""
    return a.movedim(-3, -1).contiguous()


def _rows(a: Tensor) -> Tensor:
    """[B, T, D] of which each row of D lies in one piece, rows of a sequence evenly and sequences end to end; else a copy."""
    return a if a.stride(2) == 1 and a.stride(0) == a.shape[1] * a.stride(1) else a.contiguous()


def _parameters(power: Tensor, grown: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return power.contiguous(), grown.contiguous(), C.contiguous(), D.contiguous()


def _whole(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.contiguous()


@torch.library.custom_op(
    "unisono::diagonal_ssm",
    mutates_args=(),
    schema="(Tensor u, Tensor power, Tensor grown, Tensor C, Tensor D, Tensor initial, Tensor? reset, Tensor? valid, bool save) "
    "-> (Tensor, Tensor, Tensor)",
)
def _ssm(u, power, grown, C, D, initial, reset, valid, save):
    """y, the final state, and what the way back takes: by products each chunk's inputs and the state before it, by sweeps the states before
    each tile (nothing unless `save`)."""
    y, final, saved = _ssm_fake(u, power, grown, C, D, initial, reset, valid, save)
    if u.numel() == 0:
        return y, final.copy_(initial), saved.zero_()
    acc, (batch, length, width) = accumulator(u.dtype), u.shape
    if products.serves(batch, length, reset is not None or valid is not None):
        kept = saved if save else u.new_empty(products.shape(batch, length, width, C.shape[1]), dtype=acc)
        with torch.cuda.device_of(u), uncast(u.device):
            products.forward(_rows(u), _parameters(power, grown, C, D), initial.contiguous(), y, final, kept)
        return y, final, saved
    given = {"power": power, "grown": grown, "C": C, "initial": initial}
    tensors = {name: _apart(a, acc) for name, a in given.items()} | {"D": D.to(acc).contiguous(), "y": y, "saved": saved}
    tensors |= {"reset": _whole(reset), "valid": _whole(valid), "final": torch.empty_like(tensors["initial"])}
    with torch.cuda.device_of(u):
        _launch("forward", _rows(u), C.shape[1], tensors, SAVE=save)
    return y, final.copy_(_beside(tensors["final"])), saved


@_ssm.register_fake
def _ssm_fake(u, power, grown, C, D, initial, reset, valid, save):
    batch, length, width = u.shape
    acc, marked = accumulator(u.dtype), reset is not None or valid is not None
    states = (batch, -(-length // _tile()), 2, width, C.shape[1])
    kept = products.shape(batch, length, width, C.shape[1]) if products.serves(batch, length, marked) else states
    saved = u.new_empty(kept if save else (0,), dtype=acc)
    return u.new_empty(u.shape, dtype=acc), u.new_empty((batch, *C.shape), dtype=acc), saved


@torch.library.custom_op(
    "unisono::diagonal_ssm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor dfinal, Tensor u, Tensor power, Tensor grown, Tensor C, Tensor D, Tensor? reset, Tensor? valid, "
    "Tensor saved) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _ssm_backward(dy, dfinal, u, power, grown, C, D, reset, valid, saved):
    """Gradients of u, power, grown, C, D and the initial state."""
    du, dpower, dgrown, dC, dD, dinitial = _ssm_backward_fake(dy, dfinal, u, power, grown, C, D, reset, valid, saved)
    if u.numel() == 0:
        return du, dpower.zero_(), dgrown.zero_(), dC.zero_(), dD.zero_(), dinitial.copy_(dfinal)
    acc, (batch, length, width) = accumulator(u.dtype), u.shape
    if products.serves(batch, length, reset is not None or valid is not None):
        parameters = _parameters(power, grown, C, D)
        with torch.cuda.device_of(u), uncast(u.device):
            dpower, dgrown, dC, dD, dinitial = products.backward(dy.contiguous(), dfinal.contiguous(), parameters, saved, du)
        return du, dpower, dgrown, dC, dD, dinitial
    tensors = {name: _apart(a, acc) for name, a in {"power": power, "grown": grown, "C": C, "dfinal": dfinal}.items()}
    partial = {name: saved.new_empty((batch, 2, width, C.shape[1])) for name in ("dpower", "dgrown", "dC", "dinitial")}
    partial["dD"] = saved.new_empty((batch, width))
    tensors |= {"D": D.to(acc).contiguous(), "dy": dy.contiguous(), "saved": saved, "du": du, **partial}
    tensors |= {"reset": _whole(reset), "valid": _whole(valid)}
    with torch.cuda.device_of(u):
        _launch("backward", _rows(u), C.shape[1], tensors)
    for whole, name in ((dpower, "dpower"), (dgrown, "dgrown"), (dC, "dC")):
        whole.copy_(_beside(partial[name].sum(0)))
    return du, dpower, dgrown, dC, dD.copy_(partial["dD"].sum(0)), dinitial.copy_(_beside(partial["dinitial"]))


@_ssm_backward.register_fake
def _ssm_backward_fake(dy, dfinal, u, power, grown, C, D, reset, valid, saved):
    like = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (u, power, grown, C, D, dfinal))
    return tuple(like)


def _setup(ctx, inputs, output) -> None:
    u, power, grown, C, D, initial, reset, valid, _ = inputs
    ctx.save_for_backward(u, power, grown, C, D, initial, reset, valid, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # of what is saved, zeros as large


def _gradient(ctx, dy, dfinal, _):
    *given, saved = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_plain, (*given, False), ctx.needs_input_grad, (dy, dfinal))
    u, power, grown, C, D, initial, reset, valid = given
    acc = accumulator(u.dtype)
    dy = u.new_zeros(u.shape, dtype=acc) if dy is None else dy
    dfinal = initial.new_zeros(initial.shape, dtype=acc) if dfinal is None else dfinal
    *gradients, dinitial = _ssm_backward(dy, dfinal, u, power, grown, C, D, reset, valid, saved)
    return *gradients, dinitial.to(initial.dtype), None, None, None


@torch.library.custom_op("unisono::discretised", mutates_args=(), schema="(Tensor dt, Tensor A) -> (Tensor, Tensor)")
def _discretised(dt, A):
    power, grown = _discretised_fake(dt, A)
    _discretise("forward", dt, A, {"power": power, "grown": grown})
    return power, grown


@_discretised.register_fake
def _discretised_fake(dt, A):
    return tuple(torch.empty(A.shape, dtype=torch.float64, device=A.device) for _ in range(2))


@torch.library.custom_op(
    "unisono::discretised_backward",
    mutates_args=(),
    schema="(Tensor dpower, Tensor dgrown, Tensor dt, Tensor A) -> (Tensor, Tensor)",
)
def _discretised_backward(dpower, dgrown, dt, A):
    ddt, dA = _discretised_backward_fake(dpower, dgrown, dt, A)
    given = {"dpower": dpower.contiguous(), "dgrown": dgrown.contiguous(), "ddt": ddt, "dA": dA}
    _discretise("backward", dt, A, given)
    return ddt, dA


@_discretised_backward.register_fake
def _discretised_backward_fake(dpower, dgrown, dt, A):
    return dt.new_empty(dt.shape), A.new_empty(A.shape)


def _discretise(kernel: str, dt: Tensor, A: Tensor, tensors: dict[str, Tensor]) -> None:
    import triton

    from unisono_torch.kernels.diagonal_ssm import discretise

    if A.numel():
        pairs, function = A.shape[1], getattr(discretise, kernel)
        sizes = {"P": pairs, "BP": triton.next_power_of_2(pairs), "TERMS": discretise.TERMS}
        with torch.cuda.device_of(A):
            function[(len(dt),)](dt=dt.contiguous(), A=A.contiguous(), **tensors, **sizes, num_warps=1)


def _discretised_gradient(ctx, dpower, dgrown):
    dt, A = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_discretised_plain, (dt, A), ctx.needs_input_grad, (dpower, dgrown))
    return _discretised_backward(dpower, dgrown, dt, A)


def _discretised_plain(dt, A):
    from unisono_torch.ops import diagonal_ssm as op

    return op.powers(dt, A, 1)[1], op.gain(dt, A)


_discretised.register_autograd(_discretised_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def discretised(dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """e^{ΔA} and (e^{ΔA} − 1)/A [D, P, 2], float64, of dt [D] and A [D, P, 2]."""
    return torch.ops.unisono.discretised(dt, A)


def _plain(u, power, grown, C, D, initial, reset, valid, _):
    """The same in plain operations, for second derivatives: a fold over tokens."""
    acc, h, out = accumulator(u.dtype), initial, []
    power, grown = power.to(acc), grown.to(acc)

    def product(a, b):
        (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
        return torch.stack([ar * br - ai * bi, ar * bi + ai * br], -1)

    for t in range(u.shape[1]):
        x = u[:, t].to(acc)
        if reset is not None:
            h = torch.where(reset[:, t, None, None, None], 0, h)
        if valid is not None:
            x = torch.where(valid[:, t, None], x, 0)
        new = product(power, h) + grown * x[..., None, None]
        y = 2 * (C[..., 0] * new[..., 0] - C[..., 1] * new[..., 1]).sum(-1) + D * x
        if valid is not None:
            new, y = torch.where(valid[:, t, None, None, None], new, h), torch.where(valid[:, t, None], y, 0)
        h = new
        out.append(y)
    return torch.stack(out, 1), h


_ssm.register_autograd(_gradient, setup_context=_setup)


def diagonal_ssm(
    u: Tensor,
    power: Tensor,
    grown: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, D], final state [B, D, P, 2]) of ops/diagonal_ssm.py, float32 or wider, by e^{ΔA} and (e^{ΔA} − 1)/A [D, P, 2].

    u [B, T, D], C [D, P, 2], D [D], initial_state [B, D, P, 2], reset and valid [B, T] bool. An InputError names what does not fit.
    """
    if u.dtype not in FLOATS or u.ndim != 3:
        raise InputError(f"u: got {u.dtype} {tuple(u.shape)}; give [B, T, D] of one of {', '.join(map(str, FLOATS))}")
    if C.ndim != 3 or C.shape[-1] != 2:
        raise InputError(f"C: got {tuple(C.shape)}; give [D, P, 2]")
    (batch, _, width), acc = u.shape, accumulator(u.dtype)
    for name, a, shape in (
        ("power", power, C.shape),
        ("grown", grown, C.shape),
        ("C", C, (width, *C.shape[1:])),
        ("D", D, (width,)),
        ("initial_state", initial_state, (batch, *C.shape)),
        ("reset", reset, u.shape[:2]),
        ("valid", valid, u.shape[:2]),
    ):
        if a is not None and (a.shape != shape or a.device != u.device or (a.dtype == torch.bool) != (name in ("reset", "valid"))):
            kind = "bool" if name in ("reset", "valid") else "floating-point"
            raise InputError(f"{name}: got {a.dtype} {tuple(a.shape)} on {a.device}; give {kind} {tuple(shape)} on {u.device}")
    powers = (a.to(torch.promote_types(a.dtype, acc)) for a in (power, grown))  # in float64, where they are: products take their powers
    wide = [*powers, *(a.to(acc) for a in (C, D, initial_state))]
    save = torch.is_grad_enabled() and any(a.requires_grad for a in (u, *wide))
    y, final, _ = torch.ops.unisono.diagonal_ssm(u, *wide, reset, valid, save)
    return y, final
