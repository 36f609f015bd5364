"""What the tests of exported graphs share: one export a config, its readers, and how far two float32 programs may differ."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnxruntime
import torch
import unisono_torch
from onnx.reference import ReferenceEvaluator
from unisono_spec.contract import Config, init_params
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.contract.s4d import S4DConfig
from unisono_spec.contract.transformer import TransformerConfig
from unisono_torch.models.base import Model
from unisono_torch.onnx import export
from unisono_torch.onnx.export import output_names

FIXED = CRAMConfig(d_model=8, n_layers=2, vocab_size=50)
ADAPTIVE = CRAMConfig(scheme="adaptive", d_model=8, n_layers=2, vocab_size=50, position_bits=6)
LAT = LATConfig(d_model=8, n_layers=3, vocab_size=30, head_width=4, qk_width=4, window=5, conv_mult=2, ffn_mult=2)
INFINITY = InfinityFormerConfig(d_model=8, n_layers=1, n_heads=2, d_ffn=8, vocab_size=30)
MARU = MARUConfig(d_model=8, vocab_size=30, head_hidden=8, d_state=4, n_banks=2, n_slots=3, d_memory=4, router_hidden=4)
CONFIGS: dict[str, Any] = {
    "binary": FIXED,
    "embedding": FIXED.replace(codes="embedding", tie_head=True, head_bias=True, decay=0.9),
    "gaussian": FIXED.replace(codes="frame", frame_size=3, frame_head="gaussian"),
    "adaptive": ADAPTIVE.replace(k_scale=1.0, input_norm=True, tie_head=True),
    "exclusive": ADAPTIVE.replace(n_layers=1, exclusive=True, residual="after"),
    "hybrid": LAT.replace(
        attention=["linear", "window", "conv"], feature_map="taylor2", positions="rope", norm="rms", ffn="swiglu", bias=False, window=70
    ),
    "learned": LAT.replace(attention=["linear", "window", "softmax"], feature_map="learned", positions="learned", max_positions=300),
    "transformer": TransformerConfig(d_model=8, n_layers=1, vocab_size=30, head_width=4, ffn_mult=2),
    "infinity": INFINITY,
    "numerator": INFINITY.replace(rope="numerator", decay="data", gate="vector", feature_map="learned"),
    "mamba": MambaConfig(d_model=8, n_layers=1, vocab_size=30, d_state=4),
    "maru": MARU,
    "stack": MARU.replace(n_layers=2, prenorm=True, erase="separate", router="gumbel", conv_width=1),
    "s4d": S4DConfig(d_model=8, n_layers=1, vocab_size=30, d_state=4, ffn_mult=2),
}
Arrays = dict[str, np.ndarray]
Reader = Callable[[Arrays], Arrays]

# Against float64, a graph may err four times as much as torch's float32 does (another order of roundings), and where torch is right by
# luck, by 16 roundings of 2^−24 of the largest value.
SHARE, FLOOR = 4.0, 2.0**-20


def model(name: str, dtype: str = "float32") -> Model:
    config, noise = CONFIGS[name], np.random.default_rng(3)
    # initial biases are all 0 and scales all 1, which would hide a forgotten one
    params = {key: p + np.float32(0.1) * noise.standard_normal(p.shape, np.float32) for key, p in init_params(config, seed=3).items()}
    return unisono_torch.create(config, params, dtype=dtype, param_dtype="float32").eval()


@cache
def graph(name: str) -> Path:
    path = Path(mkdtemp(prefix="unisono-")) / f"{name}.onnx"
    export(model(name), path)
    return path


@cache
def reader(name: str, kind: str) -> Reader:
    """The graph of config `name`, read by onnxruntime or by onnx's own evaluator in NumPy."""
    if kind == "onnxruntime":
        return session(graph(name), CONFIGS[name])
    evaluator: Any = ReferenceEvaluator(str(graph(name)))
    names = output_names(CONFIGS[name])
    return lambda inputs: dict(zip(names, evaluator.run(names, inputs), strict=True))


def session(path: Path, config: Config) -> Reader:
    """The graph in a file, read by onnxruntime."""
    opened: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = output_names(config)
    return lambda inputs: dict(zip(names, opened.run(names, inputs), strict=True))


def torch_outputs(name: str, inputs: Arrays, dtype: str) -> Arrays:
    """The same outputs, from torch."""
    floats = getattr(torch, dtype)
    tokens, reset, valid, *state = (torch.from_numpy(a).to(floats) if a.dtype.kind == "f" else torch.from_numpy(a) for a in inputs.values())
    with torch.no_grad():
        logits, after = model(name, dtype)(tokens, dict(zip(CONFIGS[name].states(), state, strict=True)), reset, valid)
    return {"logits": logits.numpy(), **{f"next.{key}": value.numpy() for key, value in after.items()}}


def check(name: str, inputs: Arrays, found: Arrays) -> None:
    """Hold `found` to torch in float64, by the error of torch in float32."""
    truth, float32 = torch_outputs(name, inputs, "float64"), torch_outputs(name, inputs, "float32")
    for key, y in found.items():
        assert y.shape == truth[key].shape, key
        assert y.dtype == float32[key].dtype, key
        if y.dtype.kind == "i":
            np.testing.assert_array_equal(y, truth[key], key)
            continue
        allowed = SHARE * np.abs(float32[key] - truth[key]).max(initial=0) + FLOOR * np.abs(truth[key]).max(initial=0)
        error = np.abs(y - truth[key]).max(initial=0)
        assert error <= allowed, f"{key}: off by {error:.2g}, allowed {allowed:.2g}"
