"""A graph while it is written: nodes, the parameters that they read, and the ops of this room as nodes of the domain "unisono".

`Builder` knows what every model needs: Linear layers, norms, embeddings, activations. models/ has the wiring, ops/ the functions that
stand for ops with a state, which `inlined` puts in the place of their nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from unisono_spec.contract import Config, InputError

from unisono_onnx.precision import MICROSOFT, shrink, shrinks
from unisono_onnx.targets import IR_VERSIONS, OPSETS

DOMAIN = "unisono"
Value = ir.Value

# Matrices that are read transposed lie transposed in the file, under the parameter's name with this behind it.
TRANSPOSED = ".T"
LAYER_NORM_EPS = 1e-5
SHRINK = 2.0**-40  # of rows whose squares float32 may not hold: they are divided by 1 + 2⁻⁴⁰ · mean |x|, and ε is nothing beside those


class Builder:
    """Nodes in their order, and initializers by name. `reset` and `valid` [B, T] are what every op with a state reads beside its own."""

    def __init__(self, config: Config, params: Mapping[str, np.ndarray], fused: bool = False) -> None:
        self.config, self.params, self.fused = config, params, fused
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, Value] = {}
        self.matrices: set[str] = set()  # initializers that a lower precision holds
        self._known: dict[Any, Value] = {}
        frames = config.reads_frames
        self.tokens = self.input("tokens", *((np.float32, "B", "T", config.frame_size) if frames else (np.int64,)))
        self.reset, self.valid = self.input("reset", np.bool_), self.input("valid", np.bool_)

    @property
    def fuses(self) -> bool:
        """Whether a function of ops/fused.py stands in it."""
        return any(node.op_type.startswith("Fused") for node in self.nodes)

    def input(self, name: str, dtype: Any, *shape: Any) -> Value:
        return typed(ir.Value(name=name), dtype, *(shape or ("B", "T")))

    # nodes

    def __call__(self, op: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """One node; a value, or as many as `outputs` says. Inputs that are numbers or arrays become constants."""
        given = [a if a is None or isinstance(a, Value) else self.constant(a) for a in inputs]
        node = ir.node(op, given, attributes, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def own(self, name: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """A function of ops/."""
        return self(name, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def marked(self, name: str, *inputs: Any, outputs: int = 2, **attributes: Any) -> Any:
        """An op with a state, which reads reset and valid."""
        return self.own(name, *inputs, self.reset, self.valid, outputs=outputs, **attributes)

    # values that are known

    def constant(self, array: Any) -> Value:
        """A number, or array, that is no parameter; integers are int64, floats float32 unless they are arrays."""
        a = np.asarray(array, None if isinstance(array, np.ndarray) else np.int64 if np.asarray(array).dtype.kind == "i" else np.float32)
        key = a.dtype.str, a.shape, a.tobytes()
        if key not in self._known:
            self._known[key] = self.initializer(f"constant.{len(self._known)}", a)
        return self._known[key]

    def initializer(self, name: str, array: np.ndarray) -> Value:
        if name not in self.initializers:
            tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
            self.initializers[name] = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        return self.initializers[name]

    def has(self, name: str) -> bool:
        return name in self.params

    def wide(self, name: str) -> np.ndarray:
        """A parameter in float64, for what is computed from it before the graph runs."""
        return np.asarray(self.params[name]).astype(np.float64)

    def param(self, name: str) -> Value:
        return self.initializer(name, _single(self.params[name]))

    def derived(self, name: str, array: np.ndarray, dtype: Any = np.float32) -> Value:
        """What was computed from parameters."""
        return self.initializer(name, array.astype(dtype))

    def matrix(self, name: str) -> Value:
        """The weight [out, in] of a Linear layer as MatMul reads it, [in, out]."""
        stored = f"{name}{TRANSPOSED}"
        if shrinks(self.config, name):
            self.matrices.add(stored)
        return self.initializers.get(stored) or self.initializer(stored, _single(self.params[name]).T)

    # layers

    def linear(self, x: Value, name: str, weight: str | None = None) -> Value:
        """x [..., in] → [..., out]. weight: whose weight, if another's."""
        y = self("MatMul", x, self.matrix(f"{name if weight is None else weight}.weight"))
        return self("Add", y, self.param(f"{name}.bias")) if self.has(f"{name}.bias") else y

    def norm(self, x: Value, name: str, large: bool = False) -> Value:
        """LayerNorm, which has a bias, or RMSNorm. large: of entries whose squares float32 does not hold."""
        weight = self.param(f"{name}.weight")
        if not self.has(f"{name}.bias"):
            return self.own("RMSNorm", x, weight, epsilon=self.config.norm_eps)
        # onnxruntime computes x² − mean²: where all of x shares a large part, as the entries of ξ do, little would be left of it
        centred = self("Sub", x, self("ReduceMean", x, [-1], keepdims=1))
        if large:
            size = self("ReduceMean", self("Abs", centred), [-1], keepdims=1)
            # 1 below 2¹⁵; no Max, which onnxruntime's converter to float16 breaks
            centred = self("Div", centred, self("Add", self("Mul", size, SHRINK), 1.0))
        return self("LayerNormalization", centred, weight, self.param(f"{name}.bias"), axis=-1, epsilon=LAYER_NORM_EPS)

    def embedding(self, ids: Value, name: str) -> Value:
        """ids [...] → [..., D]. A table that the head reads, too, lies as the head reads it."""
        if name != "embedding" or not getattr(self.config, "tie_head", False):
            self.matrices.add(f"{name}.weight")
            return self("Gather", self.param(f"{name}.weight"), ids, axis=0)
        columns = self("Gather", self.matrix(f"{name}.weight"), ids, axis=1)  # [D, B, T]
        return self("Transpose", columns, perm=[1, 2, 0])

    def head(self, x: Value) -> Value:
        """x [B, T, D] → logits."""
        return self.linear(self.norm(x, "norm"), "head", "embedding" if getattr(self.config, "tie_head", False) else None)

    # functions that ONNX has not, or whose operator has no digits where the result is small

    def sigmoid(self, x: Value) -> Value:
        return self.own("Logistic", x)

    def silu(self, x: Value) -> Value:
        return self.own("SiLU", x)

    def gelu(self, x: Value) -> Value:
        return self.own("GELU", x)

    def gelu_tanh(self, x: Value) -> Value:
        return self.own("TanhGELU", x)

    def softplus(self, x: Value) -> Value:
        return self.own("Softplus", x)

    def split(self, x: Value, *sizes: int) -> tuple[Value, ...]:
        """Parts of the last axis."""
        return self("Split", x, list(sizes), axis=-1, outputs=len(sizes))

    def heads(self, x: Value, heads: int) -> Value:
        """[B, T, H·X] → [B, T, H, X]."""
        return self("Reshape", x, [0, 0, heads, -1])

    def flat(self, x: Value) -> Value:
        """[B, T, …] → [B, T, X]."""
        return self("Reshape", x, [0, 0, -1])

    def digits(self, n: Value, digits: int) -> Value:
        """The last binary digits of integers [B, T] ≥ 0, most significant first: [B, T, digits] float32."""
        whole = self("Unsqueeze", self("Cast", n, to=int(ir.DataType.INT64)), [-1])
        bits = self("Mod", self("Div", whole, 2 ** np.arange(digits - 1, -1, -1, dtype=np.int64)), 2)
        return self("Cast", bits, to=int(ir.DataType.FLOAT))

    def positions(self, state: Value) -> tuple[Value, Value]:
        """The position of each token [B, T] int32, and how many tokens the sequences then hold."""
        return self.marked("Position", state)

    def rotate(self, x: Value, where: Value, width: int, base: float) -> Value:
        """Rotary position embedding of x [B, T, H, K]."""
        key = "rotate", where, width, base
        if key not in self._known:
            table = self.derived(f"rotary.{width}", rotary_table(width, base))
            self._known[key] = self.own("CosSin", where, table, outputs=2)  # pyright: ignore[reportArgumentType]
        return self.own("Rotate", x, *self._known[key])  # pyright: ignore[reportGeneralTypeIssues]

    def features(self, x: Value, name: str, tau: str) -> Value:
        """φ of linear attention (Katharopoulos et al. 2020, eq 7; Arora et al. 2024, eq 2): [..., K] → [..., F]."""
        if name == "relu":
            return self("Relu", x)
        if name == "taylor2":
            return self.own("Taylor2", x)
        return self.own("Elu1", self("Mul", x, self.param(tau)) if name == "learned" else x)


def typed(value: Value, dtype: Any, *shape: Any) -> Value:
    """`value`, with its type and its shape declared."""
    value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))), ir.Shape(shape)
    return value


def _single(a: np.ndarray) -> np.ndarray:
    return np.asarray(a).astype(np.float32, copy=False)


@cache
def rotary_table(width: int, base: float) -> np.ndarray:
    """cos and sin of the angle of every digit in base 256 at each of four places [2, 4, 256, K/2]: four turns make any int32's, exact to
    a few roundings, where a float32 angle p·f is wrong by 1e-2 at 200,000."""
    two_pi = np.longdouble("6.283185307179586476925286766559005768")
    frequency = base ** (-2.0 * np.arange(width // 2) / width)
    digits = np.arange(256, dtype=np.longdouble) * np.longdouble(256) ** np.arange(4)[:, None]
    angle = np.mod(digits[..., None] * frequency, two_pi)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float64)


@cache
def definitions() -> tuple[Any, ...]:
    """Every function of ops/ as an onnx.FunctionProto."""
    from onnx import helper
    from onnxscript import OnnxFunction

    from unisono_onnx.ops import attention, chunks, elementwise, fused, rotary, scans, sums

    found = [
        value
        for module in (chunks, elementwise, sums, rotary, attention, scans, fused)
        for value in vars(module).values()
        if isinstance(value, OnnxFunction)
    ]
    protos = [function.to_function_proto() for function in dict.fromkeys(found)]
    for proto in protos:
        if DOMAIN not in {entry.domain for entry in proto.opset_import}:
            proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return tuple(protos)


def inlined(model: ir.Model) -> None:
    """Replace every node of the domain "unisono" by standard operators, share equal ones, and name each node once."""
    from onnx_ir.passes import common

    for proto in definitions():
        function = ir.from_proto(proto)
        for domain, version in model.opset_imports.items():
            function.opset_imports[domain] = version  # what they use means the same in every opset from 21
        model.functions[function.identifier()] = function
    for step in (
        common.InlinePass(),
        common.RemoveUnusedFunctionsPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    model.opset_imports.pop(DOMAIN, None)
    name_once(model)


def name_once(model: ir.Model) -> None:
    """A name of its own for every node and every value, in the graph and in the bodies of its Scans, by which tools look them up."""
    kept = {value.name for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.op_type}.{number}"
        if node.op_type == "Constant" and "value" not in node.attributes:
            # a number or a list, which tools for shapes and precisions do not know: as a tensor
            (attribute,) = node.attributes.values()
            dtype = np.float32 if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS) else np.int64
            node.attributes.clear()
            node.attributes.add(ir.AttrTensor("value", ir.Tensor(np.array(attribute.value, dtype))))
        for place, value in enumerate(node.outputs):
            if value.name not in kept or value.graph is not model.graph:
                value.name = f"{node.name}.{place}"
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for place, value in enumerate(attribute.as_graph().inputs):
                    value.name = f"{node.name}.given.{place}"


def rank_carried(model: ir.Model) -> None:
    """Say how many axes the outputs of each Scan's body have: onnxruntime before 1.24 runs no Scan without, and cannot tell them itself."""
    from onnx_ir.passes import common

    inferred = model.clone()
    common.ShapeInferencePass()(inferred)
    for node, known in zip(model.graph.all_nodes(), inferred.graph.all_nodes(), strict=True):
        if node.op_type == "Scan":
            for value, found in zip(node.attributes["body"].as_graph().outputs, known.attributes["body"].as_graph().outputs, strict=True):
                assert found.shape is not None, f"{value.name}: of unknown rank"
                value.type, value.shape = found.type, ir.Shape([None] * len(found.shape))


def build(config: Config, params: Mapping[str, np.ndarray], target: str = "portable", precision: str = "float32") -> ir.Model:
    """The model of `config` as a graph. params: as `precision.held` rounds them."""
    g, state, logits, after = _read(config, params, fused=target != "portable")
    if g.fused and not g.fuses:
        raise InputError(f"target: {target!r}; nothing in this {config.arch} maps onto the operators that it adds: use 'portable'")
    outputs = [typed(g("Identity", logits), np.float32, "B", "T", config.output_size)]
    for name, given in state.items():
        assert given.dtype is not None
        assert given.shape is not None
        outputs.append(typed(g("Identity", after[name]), given.dtype.numpy(), *given.shape))
    for value, name in zip(outputs, ("logits", *(f"next.{name}" for name in state)), strict=True):
        value.name = name
    opsets = {"": OPSETS[target], DOMAIN: 1, **({MICROSOFT: 1} if g.fused else {})}
    graph = ir.Graph(
        [g.tokens, g.reset, g.valid, *state.values()],
        outputs,
        nodes=g.nodes,
        initializers=list(g.initializers.values()),
        opset_imports=opsets,
        name=config.arch,
    )
    model = ir.Model(graph, ir_version=IR_VERSIONS[OPSETS[target]], producer_name="unisono")
    inlined(model)
    if not g.fused:  # what reads the others is newer than 1.24
        rank_carried(model)
    if OPSETS[target] >= 27:  # which has them, too
        for node in model.graph.all_nodes():
            node.domain = ""
        model.opset_imports.pop(MICROSOFT)
    shrink(model, g.matrices, precision)
    return model


def fuses(config: Config, params: Mapping[str, np.ndarray]) -> bool:
    """Whether something in the model of `config` maps onto the operators that a target adds."""
    return _read(config, params, fused=True)[0].fuses


def _read(config: Config, params: Mapping[str, np.ndarray], fused: bool) -> tuple[Builder, dict[str, Value], Value, dict[str, Value]]:
    """A builder with the model's nodes; the state before, logits, the state after."""
    import importlib

    g = Builder(config, params, fused)
    state = {
        name: g.input(name, np.int32 if s.integer else np.float32, "B", *("capacity" if size < 0 else size for size in s.shape))
        for name, s in config.states().items()
    }
    return g, state, *importlib.import_module(f"unisono_onnx.models.{config.arch}").read(g, state)
