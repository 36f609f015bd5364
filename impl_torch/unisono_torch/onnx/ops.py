"""What a model reads by while torch traces it for export: each op is one node of the domain "unisono".

So the tracer meets no arithmetic on lengths, which it would freeze at the traced length or take minutes over. `inline` then replaces
the nodes by standard operators, by the functions of sums.py, rotary.py, attention.py and scans.py, or of fused.py for onnxruntime's own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono_torch.layers.reading import Marks, Reading, Rotation
from unisono_torch.ops import diagonal_ssm as ssm
from unisono_torch.ops import mapped_attention, rotary
from unisono_torch.ops import mom_gru as cell
from unisono_torch.ops.elementwise import softplus
from unisono_torch.ops.fold import masked
from unisono_torch.ops.gated_scan import gate

DOMAIN = "unisono"
TARGETS = ("portable", "ort")


class GraphReading(Reading):
    """Whole sequences, by nodes: of standard operators ("portable"), or onnxruntime's own where an op maps onto them ("ort")."""

    def __init__(self, reset: Tensor, valid: Tensor, target: str = "portable") -> None:
        super().__init__(Marks(reset, valid), chunk_size=64)
        self.given = reset, valid
        self.nodes = FUSED if target == "ort" else NODES

    def __call__(self, op: Any, *inputs: Any, **more: Any) -> tuple[Tensor, Any]:
        if op is mapped_attention:
            q, k, v, state = inputs
            return self.nodes["linear_attention"](*mapped_attention.features(q, k, v, **more), v, state, *self.given)
        return self.nodes[op.__name__.rpartition(".")[2]](*inputs, *self.given, **more)

    def positions(self, before: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return _node("Position", (before, *self.given), (self.given[1].int(), before))

    def rotation(self, where: Tensor, width: int, base: float, dtype: torch.dtype) -> Rotation:
        table = torch.from_numpy(rotary.prepare(width, base).astype(np.float32)).to(where.device)
        like = torch.empty(*where.shape, table.shape[-1], dtype=torch.float32, device=where.device)
        cos, sin = _node("CosSin", (where, table), (like, like))
        return lambda x: _node("Rotate", (x, cos, sin), (x,))[0]


def decayed_sum(x: Tensor, decay: float, initial_state: Tensor, reset: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    # log λ from float64: powers stay right to float32 where λ is near 1
    attributes = {"rate": math.log(decay), "gain": 1 - decay}
    return _node("DecayedSum", (x, initial_state, reset, valid), (x, initial_state), attributes)


def weighted_sum(x: Tensor, s: Tensor, initial_state: Tensor, reset: Tensor, valid: Tensor, exclusive: bool) -> tuple[Tensor, Tensor]:
    return _node("WeightedSum", (x, s, initial_state, reset, valid), (x, initial_state), {"exclusive": int(exclusive)})


def linear_attention(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], reset: Tensor, valid: Tensor) -> tuple[Tensor, Any]:
    o, *after = _node("LinearAttention", (q, k, v, *state, reset, valid), (v, *state))
    return o, tuple(after)


def fused_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], reset: Tensor, valid: Tensor
) -> tuple[Tensor, Any]:
    o, *after = _node("FusedLinearAttention", (q, k, v, *state, reset, valid), (v, *state), {"heads": k.shape[2]})
    return o, tuple(after)


def multiscale(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, log_decay: Tensor, weight: Tensor, state: tuple[Tensor, Tensor],
    reset: Tensor, valid: Tensor,
) -> tuple[Tensor, Any]:  # fmt: skip
    o, *after = _node("Multiscale", (q, k, v, q_norm, k_norm, log_decay, weight, *state, reset, valid), (v, *state))
    return o, tuple(after)


def fused_multiscale(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, log_decay: Tensor, weight: Tensor, state: tuple[Tensor, Tensor],
    reset: Tensor, valid: Tensor,
) -> tuple[Tensor, Any]:  # fmt: skip
    if q is not q_norm or k is not k_norm:
        return multiscale(q, k, v, q_norm, k_norm, log_decay, weight, state, reset, valid)
    scales, heads = state[1].shape[1:3]
    o, *after = _node("FusedMultiscale", (q, k, v, log_decay, weight, *state, reset, valid), (v, *state), {"heads": scales * heads})
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
    return _node("SelectiveScan", (u, dt, A, B, C, D, state, reset, valid), (u, state))


def fused_selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, reset: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    return _node("FusedSelectiveScan", (u, dt, A, B, C, D, state, reset, valid), (u, state), {"heads": u.shape[2]})


def gated_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, reset: Tensor, valid: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    return gate(selective_scan(u, softplus(dt), A, B, C, D, state, reset, valid), u, z)


def fused_gated_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, reset: Tensor, valid: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    return gate(fused_selective_scan(u, softplus(dt), A, B, C, D, state, reset, valid), u, z)


def diagonal_ssm(
    u: Tensor, dt: Tensor, A: Tensor, C: Tensor, D: Tensor, state: Tensor, reset: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    power, gain = ssm.powers(dt, A, 1)[1], ssm.gain(dt, A)  # float64
    return _node("DiagonalSSM", (u, power, gain, C, D, state, reset, valid), (u, state))


def mom_gru(
    x: Tensor, p: dict[str, Tensor], state: tuple[Tensor, Tensor], reset: Tensor, valid: Tensor, noise: None, temperature: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """noise and temperature: training's alone."""
    (x, weights), (h, M) = cell.prepared(x, p, valid), state
    given = torch.nn.functional.linear(x, weights.x, weights.x_bias)
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


# by the module of the op
NODES: dict[str, Any] = {
    node.__name__: node
    for node in (
        decayed_sum, weighted_sum, linear_attention, multiscale, window, softmax_attention, short_conv, selective_scan, gated_scan,
        diagonal_ssm, mom_gru,
    )
}  # fmt: skip
FUSED = {
    **NODES,
    "linear_attention": fused_linear_attention,
    "multiscale": fused_multiscale,
    "selective_scan": fused_selective_scan,
    "gated_scan": fused_gated_scan,
}


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
