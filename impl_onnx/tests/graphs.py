"""What the tests of exported graphs share: one export a config, its readers, and the court's judgement of what they read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnxruntime
from onnx.reference import ReferenceEvaluator
from unisono_conformance import judge
from unisono_onnx import export, output_names
from unisono_spec.contract import Config, init_params
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.contract.s4d import S4DConfig
from unisono_spec.contract.transformer import TransformerConfig

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
    "plus": ADAPTIVE.replace(input_norm=True, channel_weights=True, learned_decay=True, normalised=True, skip=True),
    "exclusive": ADAPTIVE.replace(n_layers=1, exclusive=True, residual="after"),
    "hybrid": LAT.replace(
        attention=["linear", "window", "conv"],
        feature_map="taylor2",
        positions="rope",
        norm="rms",
        ffn="swiglu",
        bias=False,
        head_norm=True,
        window=70,
    ),
    "learned": LAT.replace(attention=["linear", "window", "softmax"], feature_map="learned", positions="learned", max_positions=300),
    "transformer": TransformerConfig(d_model=8, n_layers=1, vocab_size=30, head_width=4, ffn_mult=2),
    "infinity": INFINITY,
    "numerator": INFINITY.replace(rope="numerator", decay="data", gate="vector", feature_map="learned"),
    "mamba": MambaConfig(d_model=8, n_layers=1, vocab_size=30, d_state=4, norm_eps=1e-3),
    "maru": MARU,
    "stack": MARU.replace(n_layers=2, prenorm=True, erase="separate", router="gumbel", conv_width=1),
    "s4d": S4DConfig(d_model=8, n_layers=1, vocab_size=30, d_state=4, ffn_mult=2),
}
Arrays = dict[str, np.ndarray]
Reader = Callable[[Arrays], Arrays]


@cache
def params(name: str) -> Arrays:
    noise = np.random.default_rng(3)
    # initial biases are all 0 and scales all 1, which would hide a forgotten one
    return {key: p + np.float32(0.1) * noise.standard_normal(p.shape, np.float32) for key, p in init_params(CONFIGS[name], seed=3).items()}


@cache
def graph(name: str) -> Path:
    path = Path(mkdtemp(prefix="unisono-")) / f"{name}.onnx"
    export(CONFIGS[name], params(name), path)
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


def check(name: str, inputs: Arrays, found: Arrays) -> None:
    """Hold `found` to the spec: each logit of a valid token and each number of the state within the court's budget."""
    after = {key: found[f"next.{key}"] for key in CONFIGS[name].states()}
    judge.model(CONFIGS[name], params(name), inputs, (found["logits"], after))
