"""MARU: embedding, Mamba block, Linear, MoM-GRU, head; or a stack with norms and residuals (docs/architectures/maru.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from unisono_onnx.builder import Builder, Value
from unisono_onnx.models.blocks import States, mamba

if TYPE_CHECKING:
    from unisono_spec.contract.maru import MARUConfig


def read(g: Builder, state: States) -> tuple[Value, States]:
    config: MARUConfig = g.config  # pyright: ignore[reportAssignmentType]

    def before(x: Value, name: str) -> Value:
        return g.norm(x, name) if config.prenorm else x

    def after(x: Value, update: Value) -> Value:
        return g("Add", x, update) if config.prenorm else update

    x, out = g.embedding(g.tokens, "embedding"), {}
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        conv, ssm, h, memory = (f"{layer}.{part}" for part in ("conv", "ssm", "h", "memory"))
        update, out[conv], out[ssm] = mamba(g, before(x, f"{layer}.mamba_norm"), f"{layer}.mamba", state[conv], state[ssm])
        x = after(x, update)
        y = g.linear(before(x, f"{layer}.cell_norm"), f"{layer}.project")
        update, out[h], out[memory] = _cell(g, config, y, f"{layer}.cell", state[h], state[memory])
        x = after(x, update)
    return g.linear(g("Relu", g.linear(before(x, "norm"), "head.0")), "head.1"), out


def _cell(g: Builder, config: MARUConfig, x: Value, name: str, h: Value, memory: Value) -> tuple[Value, Value, Value]:
    """What x contributes is computed for all tokens at once; the matrices that one token reads together are one."""
    d = config.d_model
    router, query, gates, hidden = (np.asarray(g.params[f"{name}.{part}.weight"]) for part in ("router.0", "query", "input", "hidden"))
    later = [part for part in ("key", "value", "erase", "gate") if g.has(f"{name}.{part}.weight")]

    def matrix(part: str, *rows: np.ndarray) -> Value:
        stored = f"{name}.{part}.T"
        g.matrices.add(stored)
        return g.derived(stored, np.concatenate(rows).T)

    def vector(part: str, *names: str) -> Value:
        return g.derived(f"{name}.{part}", np.concatenate([np.asarray(g.params[f"{name}.{each}.bias"]) for each in names]))

    given = g("Where", g("Unsqueeze", g.valid, [2]), x, 0.0)
    given = g("MatMul", given, matrix("by_x", router[:, :d], query[:, :d], gates[:, :d]))
    return g.marked(
        "MomGRU",
        g("Add", given, vector("by_x.bias", "router.0", "query", "input")),
        matrix("by_h", router[:, d:], query[:, d:], hidden[: 2 * d]),
        matrix("by_c", gates[:, d:]),
        matrix("candidate", hidden[2 * d :]),
        matrix("after", *(np.asarray(g.params[f"{name}.{part}.weight"]) for part in later)),
        vector("after.bias", *later),
        g.matrix(f"{name}.router.1.weight"),
        g.param(f"{name}.router.1.bias"),
        g.param(f"{name}.memory"),
        h,
        memory,
        outputs=3,
    )
