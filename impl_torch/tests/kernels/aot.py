"""Compiles kernels for GPUs that need not be there. Run in a process without TRITON_INTERPRET: `python aot.py`."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from unisono_torch.kernels import gelu, linear_cross_entropy
from unisono_torch.kernels.linear_attention import hopper_forward as linear_forward
from unisono_torch.kernels.multiscale import hopper as scales
from unisono_torch.kernels.multiscale import hopper_segments, hopper_sweep
from unisono_torch.kernels.scan import chain, operator, sweep
from unisono_torch.kernels.window import sweep as window

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# weighted, exclusive, reset, valid: each flag on and off, beside each other in turn
CHAINED = ((False, False, False, True), (False, False, True, False), (True, False, False, False), (True, True, True, True))
# kernels in Gluon: (function, which arguments are bfloat16, what is known to the compiler)
COUNTS = {
    "T",
    "H",
    "batches",
    "segments",
    "length",
    "pieces",
    "each",
    "strips",
    *(f"{letter}{i}" for letter in "qkvdegxyc" for i in range(4)),
}
LINEAR = {"UNIT": 16, "K": 64, "V": 64, "BK": 64, "BV": 64, "C": 64, "BN": 64, "MAP": "elu1", "STAGES": 4, "WARPS": 8, "PACKED": True}
SIZES = {"UNIT": 16, "WRITES": True, "K": 64, "V": 64, "C": 64, "BN": 64}
ALONE = {"UNIT": 16, "C": 64, "cos": None, "sin": None, "MAP": "", "SHARED": True, "STILL": False}
SWEEP = {"UNIT": 16, "N": 64, "C": 64, "STAGES": 3, "WARPS": 4}
GLUON = (
    (linear_forward.forward, {"q", "k", "v", "o"}, LINEAR | {"EARLY": True}),
    (linear_forward.added, {"k", "v"}, LINEAR),
    (scales.states, {"x", "y", "kept", "before"}, SIZES | {"BACK": True, "THROUGH": True, "M": 4, "NB": 2, "STAGES": 2}),
    (hopper_segments.of_queries, {"q", "k", "v", "do", "dq", "S"}, ALONE | {"FADES": True, "M": 1}),
    (hopper_sweep.forward, {"q", "k", "v", "o"}, SWEEP),
    (hopper_sweep.of_queries, {"q", "k", "v", "do", "dq"}, SWEEP),
    (hopper_sweep.of_keys, {"q", "k", "v", "do", "dk", "dv"}, SWEEP),
)
BF16, F32, I64 = POINTERS[torch.bfloat16], POINTERS[torch.float32], "*i64"
WINDOW = {"UNIT": 16, "W": 64, "K": 64, "V": 64, "BK": 64, "BV": 64, "M": 64, "N": 64, "HAS_SEGMENT": True, "DOT": triton.language.bfloat16}
SUMS = dict.fromkeys(("log_sum", "delta"), F32) | dict.fromkeys(("count", "segment"), "*i32")
LOSS = {"logits": BF16, "targets": I64, "nats": F32}
GATED = {"HAS_BIAS": True, "ROWS": gelu.GATED_ROWS, "BLOCK": gelu.GATED}
# more of them, each once: (kernel, its constants, the pointers that are not those of the dtype, the dtype)
MORE = (
    (gelu._forward, {"TANH": False, "BLOCK": gelu.BLOCK}, {}, BF16),
    (gelu._backward, {"TANH": True, "BLOCK": gelu.BLOCK}, {}, POINTERS[torch.float16]),
    (gelu._gated_forward, GATED, {"bias": F32}, BF16),
    (gelu._gated_backward, GATED, {"bias": F32, "partial": F32}, BF16),
    (linear_cross_entropy.nats_of_rows, {"SCALE": 1.0, "GRADIENT": True, "BLOCK": 4 * linear_cross_entropy.EACH}, LOSS, BF16),
    (window.forward, WINDOW, SUMS, BF16),
    (window.of_queries, WINDOW, SUMS, BF16),
    (window.of_keys, WINDOW | {"CARRIED": False}, SUMS, BF16),
)
NUMBERS = {"N", "F", "V", "rows", "step", "dstep", "T", "H", *(f"{letter}{i}" for letter in "qkvd" for i in range(3))}
SWEPT = ((False, False, False, False), (False, False, True, False))


def source(kernel: str, dtype: torch.dtype, flags: tuple[bool, ...], chained: bool) -> tuple[ASTSource, dict]:
    weighted, exclusive, reset, valid = flags
    shape = (2, 4096, 1024)
    plan = operator.make_chain(kernel, shape, dtype) if chained else operator.make_sweep(shape, dtype, 0.5)
    assert plan is not None
    wide = operator.accumulator(dtype)
    acc = POINTERS[wide]
    constants = {
        **dataclasses.asdict(plan),
        "D": shape[2],
        "DECAY": 1.0 if weighted else 0.5,
        "DRIFT": 0.0 if weighted else 1e-8,
        "LAG": 0.0 if weighted else 1e-8,
        "EXCLUSIVE": exclusive,
        "HAS_WEIGHT": weighted,
        "HAS_INITIAL": reset,
        "HAS_RESET": reset,
        "HAS_VALID": valid,
        "ACC": triton.language.float64 if wide == torch.float64 else triton.language.float32,
        "FAST": wide == torch.float32,
        "ROWS": plan.rows,
        "BLOCK": plan.block,
        "STAGES": getattr(plan, "stages", None),
        "CHUNKS": getattr(plan, "chunks", None),
    }
    function = getattr(chain if chained else sweep, kernel)
    bits = "*i64" if wide == torch.float64 else "*i32"
    types = {"x": POINTERS[dtype], "dx": POINTERS[dtype], "reset": "*i1", "valid": "*i1", "states": bits}
    scalars = ("T", "tiles", "batches", "segments", "length", "halo")
    signature = {
        name: "i32" if name in scalars else "constexpr" if name in constants else types.get(name, acc) for name in function.arg_names
    }
    # what a launch with contiguous tensors tells the compiler, so that loads are 16 bytes wide
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if signature[name][0] == "*"}
    options = {"num_warps": plan.warps, "maxnreg": getattr(plan, "registers", None)}
    fixed = {name: constants[name] for name in function.arg_names if signature[name] == "constexpr"}
    return ASTSource(function, signature, fixed, attrs), options


def main() -> None:
    compiled = 0
    kinds = [(True, flags) for flags in CHAINED] + [(False, flags) for flags in SWEPT]
    for kernel, (k, (chained, flags)) in itertools.product(("forward", "backward"), enumerate(kinds)):
        # each takes seconds: every kind once, in one dtype for one architecture, in turn
        dtype, arch = list(POINTERS)[-k % 4], (90, 80)[k % 2]
        made, options = source(kernel, dtype, flags, chained)
        binary = triton.compile(made, target=GPUTarget("cuda", arch, 32), options=options)
        assert binary.asm["cubin"]
        compiled += 1
        if "-v" in sys.argv:
            print(kernel, dtype, flags, chained, arch, len(binary.asm["cubin"]), flush=True)
    for kernel, fixed, others, dtype in MORE:
        types = dict.fromkeys(kernel.arg_names, dtype) | dict.fromkeys(NUMBERS, "i32") | {"scale": "fp32"} | others
        signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
        attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
        assert triton.compile(ASTSource(kernel, signature, fixed, attrs), target=GPUTarget("cuda", 90, 32)).asm["cubin"]
        compiled += 1
    for kernel, halves, fixed in GLUON:
        signature = {
            n: "constexpr" if n in fixed else "*bf16" if n in halves else "i32" if n in COUNTS else "*fp32" for n in kernel.arg_names
        }
        attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"}
        made = GluonASTSource(kernel, signature, fixed, attrs)
        assert "wgmma" in triton.compile(made, target=GPUTarget("cuda", 90, 32), options={"num_warps": fixed.get("WARPS", 4)}).asm["ptx"]
        compiled += 1
    print(f"{compiled} compiled")


if __name__ == "__main__":
    main()
