"""Weights in fewer bits: which, how they are rounded, and how a graph reads them. What is computed stays float32, and so do states.

float16: halves. int8, int4: blocks of BLOCK weights along the inputs of a matrix share a scale s; w = s q, with −2^{b−1} ≤ q < 2^{b−1},
and s such that the weight of the block that is largest in size has q = −2^{b−1}. So what is stored once comes out the same when it is
stored again, to the last bit.

float16 and int8 are made wide by standard operators of constants, which onnxruntime evaluates once, when it opens the file: its MatMulNBits
of 8 bits would do so for each token. That of 4 bits multiplies by them as they are, and GatherBlockQuantized looks rows up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from unisono_spec.contract import Arrays, Config

BITS = {"int8": 8, "int4": 4}
BLOCK = 32
MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators
# Small, and with errors that add up over tokens or stand in an exponent: what scores, decays, step sizes and routers are made of
_KEPT = re.compile(r"\.(score\.\d|mixer\.Q|dt_proj\.weight|router\.1|mixer\.decay)\b")
# of these weights [out, in] some columns are read with x, the others with the state: no block has both
_HALVES = re.compile(r"\.cell\.(router\.0|query|input)\.weight$")


def shrinks(config: Config, name: str) -> bool:
    """Whether a lower precision holds the parameter `name`: matrices of Linear layers, and tables of embeddings."""
    shape = config.params()[name].shape
    return name.endswith((".weight", "mixer.Q")) and len(shape) == 2 and not _KEPT.search(name)


def held(config: Config, params: Mapping[str, np.ndarray], precision: str) -> Arrays:
    """The parameters that a graph of this precision computes with, in float32."""
    out = {name: np.asarray(p).astype(np.float32, copy=False) for name, p in params.items()}
    if precision == "float32":
        return out
    for name in (name for name in out if shrinks(config, name)):
        halves = np.split(out[name], [config.d_model], 1) if _HALVES.search(name) else [out[name]]
        out[name] = np.concatenate([_rounded(half, precision) for half in halves], 1)
    return out


def _rounded(weight: np.ndarray, precision: str) -> np.ndarray:
    if precision == "float16":
        return weight.astype(np.float16).astype(np.float32)
    return dequantised(*quantised(weight, BITS[precision]))[:, : weight.shape[1]]


def quantised(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """weight [out, in] → q [out, blocks, BLOCK] int8, scale [out, blocks] float32; zeros behind the last input."""
    rows, width = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -width % BLOCK))).reshape(rows, -1, BLOCK)
    at = np.abs(padded).argmax(-1, keepdims=True)
    scale = np.take_along_axis(padded, at, -1) / np.float32(-(2 ** (bits - 1)))  # a power of two: exact
    steps = np.divide(padded, scale, out=np.zeros_like(padded), where=scale != 0)
    half = 2 ** (bits - 1)
    return np.clip(np.rint(steps), -half, half - 1).astype(np.int8), scale[..., 0]


def dequantised(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[out, blocks · BLOCK] float32."""
    return (q.astype(np.float32) * scale[..., None]).reshape(len(q), -1)


def packed(q: np.ndarray) -> np.ndarray:
    """4-bit q […, BLOCK] → […, BLOCK / 2] uint8, with 8 added to each; of two in a byte, the first lies in the low half."""
    positive = (q + 8).astype(np.uint8)
    return positive[..., ::2] | (positive[..., 1::2] << 4)


def shrink(model: ir.Model, matrices: set[str], precision: str) -> None:
    """Hold the initializers `matrices`, whose values are `held`'s, in `precision`, and read them so, in the bodies of Scans as well."""
    if precision == "float32":
        return
    for name in sorted(matrices & set(model.graph.initializers)):
        value = model.graph.initializers[name]
        if precision == "int4":
            _multiply_narrow(model, value)
        else:
            _make_wide(model, value, precision)
    if precision == "int4":
        model.opset_imports[MICROSOFT] = 1


def _make_wide(model: ir.Model, value: ir.Value, precision: str) -> None:
    """By nodes at the beginning of the graph."""
    name, weight = value.name, _array(value)
    assert name is not None
    wide = {"to": int(ir.DataType.FLOAT)}
    if precision == "float16":
        nodes = [ir.node("Cast", [_constant(model, f"{name}.float16", weight.astype(np.float16))], wide)]
    else:
        table = _is_table(value)
        q, scale = _exactly(name, weight if table else weight.T, 8)
        width = weight.shape[1 if table else 0]
        nodes = [ir.node("Cast", [_constant(model, f"{name}.int8", q)], wide)]
        nodes.append(ir.node("Mul", [nodes[-1].outputs[0], _constant(model, f"{name}.scale", scale[..., None])]))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], _constant(model, "rows", np.array([0, -1], np.int64))]))
        if width % BLOCK:
            nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *_ends(model, width)]))
        if not table:
            nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [1, 0]}))
    for number, node in enumerate(nodes):
        node.name = f"{name}.wide.{number}"
        node.outputs[0].name = f"{node.name}.0"
    del model.graph.initializers[name]
    nodes[-1].outputs[0].name = name
    value.replace_all_uses_with(nodes[-1].outputs[0])
    model.graph.insert_before(model.graph[0], nodes)


def _multiply_narrow(model: ir.Model, value: ir.Value) -> None:
    name, weight, table = value.name, _array(value), _is_table(value)
    assert name is not None
    for node in [use.node for use in value.uses() if use.node.op_type == "Shape"]:
        start, end = (node.attributes[part].value if part in node.attributes else None for part in ("start", "end"))
        node.outputs[0].replace_all_uses_with(_constant(model, f"{node.name}.known", np.array(weight.shape[start:end], np.int64)))
        _remove(node)
    q, scale = _exactly(name, weight if table else weight.T, 4)
    width = weight.shape[1 if table else 0]
    data, scales, rows = _constant(model, f"{name}.int4", packed(q)), _constant(model, f"{name}.scale", scale), None
    for node in [use.node for use in value.uses()]:
        if node.op_type == "MatMul":
            more = {"K": width, "N": len(q), "bits": 4, "block_size": BLOCK, "accuracy_level": 1}
            _replace(node, [ir.node("MatMulNBits", [node.inputs[0], data, scales], more, domain=MICROSOFT, name=f"{node.name}.nbits")])
            continue
        if rows is None:
            flat = ir.node("Reshape", [data, _constant(model, "rows", np.array([0, -1], np.int64))], name=f"{name}.flat")
            model.graph.insert_before(model.graph[0], flat)
            rows = flat.outputs[0]
            rows.name = f"{name}.flat.0"
        more = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": 4}
        new = [ir.node("GatherBlockQuantized", [rows, node.inputs[1], scales], more, domain=MICROSOFT, name=f"{node.name}.nbits")]
        if width % BLOCK:
            new.append(ir.node("Slice", [new[0].outputs[0], *_ends(model, width)], name=f"{node.name}.slice"))
        if table:
            _replace(node, new)
            continue
        (transposed,) = [use.node for use in node.outputs[0].uses()]  # it gathered columns, which are then transposed
        assert transposed.op_type == "Transpose"
        _replace(transposed, new)
        _remove(node)
    del model.graph.initializers[name]


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _is_table(value: ir.Value) -> bool:
    """Whether it lies as rows that are looked up, and not transposed, [in, out]."""
    return all(use.node.op_type == "Gather" and not use.node.attributes["axis"].value for use in value.uses())


def _exactly(name: str, weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    q, scale = quantised(weight, bits)
    if not (dequantised(q, scale)[:, : weight.shape[1]] == weight).all():
        raise AssertionError(f"{name} is not what was to be held")
    return q, scale


def _ends(model: ir.Model, width: int) -> list[ir.Value]:
    """What cuts a last axis to `width`."""
    return [_constant(model, f"cut.{n}", np.array([n], np.int64)) for n in (0, width, -1)]


def _replace(node: ir.Node, new: list[ir.Node]) -> None:
    """`new`, one after another, in the place of `node`, under whose name their result goes on."""
    for each in new:
        each.outputs[0].name = f"{each.name}.0"
    assert node.graph is not None
    node.graph.insert_before(node, new)
    old, result = node.outputs[0], new[-1].outputs[0]
    result.type, result.shape = old.type, old.shape
    old.replace_all_uses_with(result)
    _remove(node)


def _remove(node: ir.Node) -> None:
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    if name not in model.graph.initializers:
        tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.initializers[name] = value
    return model.graph.initializers[name]
