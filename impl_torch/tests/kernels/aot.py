"""Compiles every kernel for GPUs that need not be there. Run in a process without TRITON_INTERPRET: `python aot.py`."""

from __future__ import annotations

import itertools
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from unisono_torch.kernels import operator, sweep

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# weighted, exclusive, reset, valid, reduce, carry: each flag on and off, beside each other in turn
FLAGS = (
    (False, False, False, False, False, False),
    (False, False, True, True, True, False),
    (False, False, True, True, False, True),
    (True, False, False, True, False, False),
    (True, True, True, False, False, True),
    (True, True, True, True, True, False),
)


def source(kernel: str, dtype: torch.dtype, flags: tuple[bool, ...]) -> tuple[ASTSource, operator.Plan]:
    weighted, exclusive, reset, valid, reduce, carry = flags
    plan = operator.make_plan((2, 4096, 1024), dtype, 0.5, valid)
    wide = operator.accumulator(dtype)
    acc = POINTERS[wide]
    constants = {
        "DECAY": 1.0 if weighted else 0.9,
        "DRIFT": 0.0 if weighted else 1e-8,
        "EXCLUSIVE": exclusive,
        "REDUCE": reduce,
        "REVERSE": reduce,
        "HAS_WEIGHT": weighted,
        "HAS_INITIAL": not reduce and not carry,
        "HAS_RESET": reset,
        "HAS_VALID": valid,
        "HAS_CARRY": carry,
        "ACC": triton.language.float64 if wide == torch.float64 else triton.language.float32,
        "FAST": wide == torch.float32,
        "ROWS": plan.rows,
        "BLOCK": plan.block,
        "STAGES": plan.stages,
    }
    types = {"x": POINTERS[dtype], "dx": POINTERS[dtype], "reset": "*i1", "valid": "*i1"}
    scalars = ("T", "D", "segments", "length", "halo")
    function = getattr(sweep, kernel)
    signature = {
        name: "constexpr" if name in constants else "i32" if name in scalars else types.get(name, acc) for name in function.arg_names
    }
    # what a launch with contiguous tensors and a width divisible by 16 tells the compiler, so that loads are 16 bytes wide
    even = [["tt.divisibility", 16]]
    attrs = {(i,): even for i, name in enumerate(function.arg_names) if signature[name][0] == "*" or name in ("T", "D", "length")}
    return ASTSource(function, signature, {name: constants[name] for name in function.arg_names if name in constants}, attrs), plan


def main() -> None:
    compiled = 0
    for kernel, dtype, flags, arch in itertools.product(("forward", "backward", "fold"), POINTERS, FLAGS, (80, 90)):
        if kernel == "fold" and flags not in FLAGS[1:3]:
            continue
        # a quarter of the lattice, since each takes a second or more
        if (FLAGS.index(flags) + list(POINTERS).index(dtype) + arch // 10 * 2) % 4:
            continue
        made, plan = source(kernel, dtype, flags)
        binary = triton.compile(made, target=GPUTarget("cuda", arch, 32), options={"num_warps": plan.warps})
        assert binary.asm["cubin"]
        compiled += 1
        if "-v" in sys.argv:
            print(kernel, dtype, flags, arch, len(binary.asm["cubin"]), flush=True)
    print(f"{compiled} compiled")


if __name__ == "__main__":
    main()
