"""`unisono::turned_multiscale`: RoPE and φ of queries and keys, as kernels/rotary makes them, and what is read by them, of one array.

Gradients of q, k and v are written where they lie in one array, which is the gradient of the product that made them: apart, they would be
copied once more. On a Hopper GPU what makes them turns them back as well. Saved: inputs, queries and keys as turned, and a float32
denominator a token, head and scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unisono_torch.kernels.multiscale import operator as scales
from unisono_torch.kernels.rotary import operator as rotary
from unisono_torch.ops.transforms import again

State = tuple[Tensor, Tensor]
_INPUTS = (
    "Tensor qkv, Tensor cos, Tensor sin, Tensor? tau, str feature_map, Tensor log_decay, Tensor weight, Tensor S, Tensor z, Tensor? reset, "
    "Tensor? valid, bool still"
)


@torch.library.custom_op(
    "unisono::turned_multiscale", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _forward(qkv, cos, sin, tau, feature_map, log_decay, weight, S, z, reset, valid, still):
    """qkv [B, T, 3, H, K]; the rest as in rotary and multiscale → o, S, z, denominators, q and k as turned."""
    q, k, v = qkv.unbind(2)
    q, k, _, _ = torch.ops.unisono.rotary(q, k, cos, sin, tau, feature_map, False)
    return *scales.read(q, k, v, None, None, log_decay, weight, S, z, reset, valid, still), q, k


@_forward.register_fake
def _forward_fake(qkv, cos, sin, tau, feature_map, log_decay, weight, S, z, reset, valid, still):
    q, k, v = (qkv.new_empty((*qkv.shape[:2], *qkv.shape[3:])) for _ in range(3))
    return *scales._forward_fake(q, k, v, None, None, log_decay, weight, S, z, reset, valid), q, k


@torch.library.custom_op(
    "unisono::turned_multiscale_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor dS, Tensor dz, Tensor denominator, Tensor q, Tensor k, {_INPUTS}, bool fades, bool weighs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    do, dS, dz, denominator, q, k, qkv, cos, sin, tau, feature_map, log_decay, weight, S, z, reset, valid, still, fades, weighs
):  # fmt: skip
    """Gradients of qkv, tau (empty without it), log_decay and weight (empty without `fades`, `weighs`), S and z."""
    given = (do, dS, dz, denominator, q, k, qkv, cos, sin, tau, feature_map, log_decay, weight, S, z, reset, valid, still, fades, weighs)
    dqkv, dtau, *_ = _backward_fake(*given)
    before_q, before_k, v = qkv.unbind(2)
    dq_out, dk_out, dv_out = dqkv.unbind(2)
    turn = scales.Turn(cos, sin, feature_map, dq_out, dk_out, dv_out)
    dq, dk, dv, _, _, *others = scales.gradients(
        do, dS, dz, denominator, q, k, v, None, None, log_decay, weight, S, z, reset, valid, fades, weighs, turn, still
    )
    if dq is not dq_out:
        none = q.new_empty((0,))
        rotary.turn_back((dq, dk, none, none), before_q, before_k, cos, sin, tau, feature_map, False, dq_out, dk_out, dtau)
        dv_out.copy_(dv)
    if still and fades:
        others[0][..., 0] = 0
    return dqkv, dtau, *others


@_backward.register_fake
def _backward_fake(
    do, dS, dz, denominator, q, k, qkv, cos, sin, tau, feature_map, log_decay, weight, S, z, reset, valid, still, fades, weighs
):  # fmt: skip
    *_, dlog_decay, dweight, dS, dz = scales._backward_fake(
        do, dS, dz, denominator, q, k, q, None, None, log_decay, weight, S, z, reset, valid, fades, weighs
    )
    return qkv.new_empty(qkv.shape), q.new_empty((0,)) if tau is None else tau.new_empty(tau.shape), dlog_decay, dweight, dS, dz


def _setup(ctx, inputs, output) -> None:
    qkv, cos, sin, tau, ctx.feature_map, *tensors, ctx.still = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*output[3:], qkv, cos, sin, tau, *tensors)


def _gradient(ctx, do, dS, dz, *_):
    denominator, q, k, qkv, cos, sin, tau, *tensors = ctx.saved_tensors
    inputs = qkv, cos, sin, tau, ctx.feature_map, *tensors, ctx.still
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_plain, inputs, ctx.needs_input_grad, (do, dS, dz))
    fades, weighs = ctx.needs_input_grad[5:7]
    dqkv, dtau, dlog_decay, dweight, dS0, dz0 = _backward(do, dS, dz, denominator, q, k, *inputs, fades, weighs)
    S, z = tensors[2:4]
    of_tau, of_decay, of_weight = None if tau is None else dtau, dlog_decay if fades else None, dweight if weighs else None
    return dqkv, None, None, of_tau, None, of_decay, of_weight, dS0.to(S.dtype), dz0.to(z.dtype), None, None, None


def _plain(qkv, cos, sin, tau, feature_map, log_decay, weight, S, z, reset, valid, still):
    """The same in plain operations, for second derivatives."""
    from unisono_torch.ops import multiscale, rotary

    q, k, v = qkv.unbind(2)
    if still:
        log_decay = torch.cat([log_decay[..., :1].detach(), log_decay[..., 1:]], -1)
    q, k = (a.to(v.dtype) for a in rotary.turned(q, k, cos, sin, feature_map, tau, False, "plain")[:2])
    o, (S, z) = multiscale.parallel(q, k, v, q, k, log_decay, weight, (S, z), reset, valid, implementation="plain")
    return o.to(v.dtype), S, z


_forward.register_autograd(_gradient, setup_context=_setup)


def turned(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    feature_map: str,
    tau: Tensor | None,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    still: bool = False,
) -> tuple[Tensor, State]:
    """As ops/multiscale.py's, RoPE before φ, a weight that channels share; cos and sin [B or 1, T, K/2] float32. o comes in qkv's dtype.

    Differentiable in qkv, tau, log_decay, weight and the state; a second time by plain operations.
    """
    o, S, z = torch.ops.unisono.turned_multiscale(qkv, cos, sin, tau, feature_map, log_decay, weight, *initial_state, reset, valid, still)[
        :3
    ]
    return o, (S, z)
