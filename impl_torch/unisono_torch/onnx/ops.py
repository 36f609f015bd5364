"""What stands for an op while torch traces a model for export: one node of the domain "unisono".

So the tracer meets no arithmetic on lengths, which it would freeze at the traced length or take minutes over. `inline` then replaces
the nodes by standard operators, by the functions of sums.py, rotary.py, attention.py and scans.py, or of fused.py for onnxruntime's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono_torch.ops.fold import masked

DOMAIN = "unisono"
TARGETS = ("portable", "ort")
_target = ContextVar("target", default="portable")


@contextmanager
def target(name: str) -> Iterator[None]:
    """Trace for standard operators ("portable"), or with onnxruntime's own where an op maps onto them ("ort")."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def decayed_sum(x: Tensor, decay: float, initial_state: Tensor, reset: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    # log λ from float64: powers stay right to float32 where λ is near 1
    attributes = {"rate": math.log(decay), "gain": 1 - decay}
    return _node("DecayedSum", (x, initial_state, reset, valid), (x, initial_state), attributes)


def weighted_sum(x: Tensor, s: Tensor, initial_state: Tensor, reset: Tensor, valid: Tensor, exclusive: bool) -> tuple[Tensor, Tensor]:
    return _node("WeightedSum", (x, s, initial_state, reset, valid), (x, initial_state), {"exclusive": int(exclusive)})


def position(initial_state: Tensor, reset: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    return _node("Position", (initial_state, reset, valid), (valid.int(), initial_state))


def turn(position: Tensor, table: np.ndarray) -> tuple[Tensor, Tensor]:
    like = torch.empty(*position.shape, table.shape[-1], dtype=torch.float32, device=position.device)
    return _node("Turn", (position, torch.from_numpy(table.astype(np.float32)).to(position.device)), (like, like))


def rotate_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _node("Rotate", (x, cos, sin), (x,))[0]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], reset: Tensor, valid: Tensor) -> tuple[Tensor, Any]:
    name, attributes = ("FusedLinearAttention", {"heads": k.shape[2]}) if _target.get() == "ort" else ("LinearAttention", {})
    o, *after = _node(name, (q, k, v, *state, reset, valid), (v, *state), attributes)
    return o, tuple(after)


def multiscale(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, log_decay: Tensor, weight: Tensor, state: tuple[Tensor, Tensor],
    reset: Tensor, valid: Tensor,
) -> tuple[Tensor, Any]:  # fmt: skip
    if _target.get() == "ort" and q is q_norm and k is k_norm:
        scales, heads = state[1].shape[1:3]
        o, *after = _node("FusedMultiscale", (q, k, v, log_decay, weight, *state, reset, valid), (v, *state), {"heads": scales * heads})
        return o, tuple(after)
    o, *after = _node("Multiscale", (q, k, v, q_norm, k_norm, log_decay, weight, *state, reset, valid), (v, *state))
    return o, tuple(after)


def window(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...], reset: Tensor, valid: Tensor) -> tuple[Tensor, Any]:
    o, *after = _node("Window", (q, k, v, *state, reset, valid), (v, *state))
    return o, tuple(after)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...], reset: Tensor, valid: Tensor) -> tuple[Tensor, Any]:
    o, *after = _node("SoftmaxAttention", (q, k, v, *state, reset, valid), (v, *state))
    return o, tuple(after)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    taps = weight[:, 0].mT
    y, final = (x * taps[0], torch.zeros_like(state)) if len(taps) == 1 else _node("ShortConv", (x, taps, state, reset, valid), (x, state))
    return masked(valid, y if bias is None else y + bias)[0], final


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, reset: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    name, attributes = ("FusedSelectiveScan", {"heads": u.shape[2]}) if _target.get() == "ort" else ("SelectiveScan", {})
    return _node(name, (u, dt, A, B, C, D, state, reset, valid), (u, state), attributes)


def diagonal_ssm(
    u: Tensor, power: Tensor, gain: Tensor, C: Tensor, D: Tensor, state: Tensor, reset: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """power: e^{ΔA}, gain: (e^{ΔA} − 1)/A, both float64."""
    return _node("DiagonalSSM", (u, power, gain, C, D, state, reset, valid), (u, state))


def mom_gru(
    given: Tensor, weights: Any, state: tuple[Tensor, Tensor], reset: Tensor, valid: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """given: the products with x; weights: the others of ops/mom_gru.py."""
    h, M = state
    matrices = (
        weights.h.mT,
        weights.c.mT,
        weights.candidate.mT,
        weights.after.mT,
        weights.after_bias,
        weights.router.mT,
        weights.router_bias,
    )
    like = given[..., : h.shape[1]]
    o, h, M = _node("MomGRU", (given, *matrices, weights.memory.reshape(M.shape[1:]), h, M, reset, valid), (like, h, M))
    return o, (h, M)


def _node(name: str, inputs: tuple[Tensor, ...], like: tuple[Tensor, ...], attributes: dict[str, Any] | None = None) -> Any:
    """One node; its outputs have the dtypes and shapes of `like`."""
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}",
        inputs,
        attributes or {},
        dtypes=tuple(a.dtype for a in like),
        shapes=tuple(a.shape for a in like),
        version=1,
    )


def translations() -> dict[Any, Any]:
    """What the exporter shall use in place of its own translations of torch's functions."""
    from unisono_torch.onnx import elementwise

    return {torch.ops.aten.log_sigmoid.default: elementwise.log_sigmoid}


def definitions() -> list[Any]:
    """Every function as an onnx.FunctionProto."""
    from onnx import helper
    from onnxscript import OnnxFunction

    from unisono_torch.onnx import attention, chunks, fused, rotary, scans, sums

    found = [
        value
        for module in (chunks, sums, rotary, attention, scans, fused)
        for value in vars(module).values()
        if isinstance(value, OnnxFunction)
    ]
    protos = [function.to_function_proto() for function in dict.fromkeys(found)]
    for proto in protos:
        if DOMAIN not in {entry.domain for entry in proto.opset_import}:
            proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return protos


def inline(model: Any) -> None:
    """Replace every node of the domain "unisono" in `model` (an onnx_ir.Model) by standard operators, and share equal ones."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    for proto in definitions():
        function = ir.from_proto(proto)
        model.functions[function.identifier()] = function
    for step in (
        common.InlinePass(),
        common.RemoveUnusedFunctionsPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),  # a stack trace for each node
    ):
        step(model)
    model.opset_imports.pop(DOMAIN, None)
