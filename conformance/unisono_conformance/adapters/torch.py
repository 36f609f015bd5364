"""Unisono's PyTorch room before the court. `implementation`: plain; triton where kernels can run (a GPU, or Triton's interpreter)."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unisono_torch
from unisono_spec.contract import ARCHITECTURES, Config
from unisono_spec.contract.implementations import PLAIN, dtypes, served
from unisono_torch.arrays import from_numpy, to_numpy
from unisono_torch.kernels import registry

from unisono_conformance.adapter import Arrays, Capabilities, Gradients, flatten, grouped
from unisono_conformance.cases import ops


class Model:
    def __init__(self, model: Any, forward: Any = None) -> None:
        self.model, self.call = model, model if forward is None else forward

    def forward(self, tokens, state=None, reset=None, valid=None, form="parallel", chunk_size=64, dropout=None, noise=None):
        drawn = (None if arrays is None else [self._in(a) for a in arrays] for arrays in (dropout, noise))
        with torch.no_grad():
            logits, after = self.call(self._in(tokens), self._state(state), self._in(reset), self._in(valid), form, chunk_size, *drawn)
        return to_numpy(logits), {name: to_numpy(a) for name, a in after.items()}

    def step(self, token, state, reset=None, valid=None):
        with torch.no_grad():
            logits, after = self.model.step(self._in(token), self._state(state), self._in(reset), self._in(valid))
        return to_numpy(logits), {name: to_numpy(a) for name, a in after.items()}

    def vjp(self, tokens, dlogits, dstate, state=None, reset=None, valid=None, form="parallel", chunk_size=64, dropout=None, noise=None):
        x, start = self._in(tokens), self._state(state)
        drawn = (None if arrays is None else [self._in(a) for a in arrays] for arrays in (dropout, noise))
        params = dict(self.model.named_parameters())
        leaves = {**params, **{f"state {n}": start[n].requires_grad_() for n in dstate if start is not None}}
        if x.is_floating_point():
            leaves["tokens"] = x.requires_grad_()
        logits, after = self.call(x, start, self._in(reset), self._in(valid), form, chunk_size, *drawn)
        outputs = [logits, *(after[n] for n in dstate)]
        found = _gradients(outputs, [self._in(d) for d in (dlogits, *dstate.values())], leaves)
        return Gradients(
            {n: found[n] for n in params},
            {n: found[n] for n in leaves if n == "tokens"},
            {n: found[f"state {n}"] for n in dstate if start is not None},
            to_numpy(logits.detach()),
            {n: to_numpy(a.detach()) for n, a in after.items()},
        )

    def params(self) -> Arrays:
        return unisono_torch.numpy_params(self.model)

    def compiled(self) -> Model:
        torch._dynamo.reset()  # dynamo counts the compilations of one function over all models, and refuses after some
        # a cheap backend: whether the graph can be captured whole, and whether capturing changes it, is what is asked
        return Model(self.model, torch.compile(self.model, backend="eager", fullgraph=True, dynamic=False))

    def _in(self, array: Any) -> Any:
        return None if array is None else from_numpy(np.ascontiguousarray(array), self.model.device)

    def _state(self, state: Arrays | None) -> dict[str, torch.Tensor] | None:
        return None if state is None else {n: self._in(a) for n, a in state.items()}


OPS_OF = "unisono_torch.ops."

# Ops whose kernels walk token by token, or are several with many products each, which costs their interpreter seconds an example: there
# the room's own tests judge them, on a GPU the court does.
LONG = ("selective_scan", "diagonal_ssm", "multiscale", "mom_gru", "window")


class Adapter:
    name = "torch"
    known_gaps = None
    # torch.compile warns about its own use of deprecated interfaces; cuBLAS, of the context that it then makes for the backward's thread
    warnings = ("ignore::DeprecationWarning:torch.*", "ignore:Attempting to run cuBLAS:UserWarning")

    def __init__(self) -> None:
        torch.set_num_threads(1)  # tiny models; and the same bits twice are promised for one thread count
        if registry.available("cpu"):
            from unisono_torch.kernels import interpreter

            interpreter.install()
        devices, rows = ("cpu", *(("cuda",) if torch.cuda.is_available() else ())), registry.IMPLEMENTATIONS
        kernels = {op: names for op, names in served(rows, "triton").items() if op not in LONG or not registry.interpreted()}
        self.capabilities = Capabilities(
            ops=ops(rows),
            dtypes=dtypes(rows),
            devices=devices,
            implementations=(PLAIN, *(("triton",) if any(map(registry.available, devices)) else ())),
            narrower={"triton": kernels | _whole(kernels)},
            rounds=("triton",),
            compiled=True,
            dear=("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else (),
        )

    def build(self, config: Config, params: Arrays, dtype: str, device: str, implementation: str) -> Model:
        # CRAM's departures run as a selective scan, which is one of LONG: in the interpreter it is left to its own tests
        if getattr(config, "retains", False) and registry.interpreted():
            implementation = "plain"
        return Model(unisono_torch.create(config, params, dtype=dtype, device=device, implementation=implementation))

    def op(self, name: str, form: str, arrays: Arrays, settings: Mapping[str, Any], device: str, implementation: str):
        with torch.no_grad():
            o, last = _call(
                name, form, {n: from_numpy(np.ascontiguousarray(a), device) for n, a in arrays.items()}, settings, implementation
            )
        return to_numpy(o), tuple(map(to_numpy, flatten(last)))

    def op_vjp(self, name, form, arrays, settings, do, dstate, device, implementation):
        tensors = {n: from_numpy(np.ascontiguousarray(a), device) for n, a in arrays.items()}
        leaves = {n: t.requires_grad_() for n, t in tensors.items() if t.is_floating_point()}
        o, last = _call(name, form, tensors, settings, implementation)
        found = _gradients([o, *flatten(last)], [from_numpy(d, device) for d in (do, *flatten(dstate))], leaves)
        return to_numpy(o.detach()), tuple(to_numpy(a.detach()) for a in flatten(last)), found


def _call(name: str, form: str, tensors: dict[str, torch.Tensor], settings: Mapping[str, Any], implementation: str) -> Any:
    more = {"implementation": implementation} if form == "parallel" else {}
    op = importlib.import_module(f"unisono_torch.ops.{name}")
    call = op.hoisted if form == "parallel" and hasattr(op, "hoisted") else getattr(op, form)
    return call(**grouped(tensors), **settings, **more)


def _gradients(outputs: list[torch.Tensor], cotangents: list[torch.Tensor], leaves: dict[str, torch.Tensor]) -> Arrays:
    """By name; what no output depends on has a gradient of zero."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    given = [widened(c, o) for o, c in pairs]
    found = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), given, allow_unused=True)
    return {n: to_numpy(torch.zeros_like(leaf) if g is None else g) for (n, leaf), g in zip(leaves.items(), found, strict=True)}


def widened(c: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """A cotangent in the dtype of o, which may come wider than c was rounded; to round c, as autograd would, would hide a narrow o."""
    if torch.promote_types(c.dtype, o.dtype) != o.dtype:
        raise TypeError(f"an output of dtype {o.dtype} for a cotangent of dtype {c.dtype}")
    return c.to(o.dtype)


def _whole(kernels: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The architectures all of whose sequence ops are in `kernels`, and the dtypes in which all of them are."""
    found = {}
    for arch in ARCHITECTURES:
        sources = [importlib.import_module(f"unisono_torch.{kind}.{arch}") for kind in ("layers", "models") if _is_there(kind, arch)]
        modules = {v.__name__: v for source in sources for v in vars(source).values() if inspect.ismodule(v)}
        ours = {n.removeprefix(OPS_OF): v for n, v in modules.items() if n.startswith(OPS_OF)}
        used = {n for n, v in ours.items() if hasattr(v, "parallel") or hasattr(v, "hoisted")}
        if used and used <= set(kernels):
            found[arch] = tuple(dtype for dtype in kernels[min(used)] if all(dtype in kernels[op] for op in used))
    return found


def _is_there(kind: str, arch: str) -> bool:
    return importlib.util.find_spec(f"unisono_torch.{kind}.{arch}") is not None


def export(model: Model, path: Path) -> None:
    """Write the ONNX graph of a model."""
    from unisono_torch.onnx import export as export_graph

    export_graph(model.model, path)


def make() -> Adapter:
    return Adapter()
