"""Compiles every kernel of a decoded token for an H100 that need not be there, as presets of one layer launch them. Run in a process
without TRITON_INTERPRET: `python impl_torch/tests/kernels/aot_decoding.py`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from unisono_spec.contract import preset
from unisono_torch import create
from unisono_torch.decoding import fused
from unisono_torch.decoding.parts import Held
from unisono_torch.kernels import registry
from unisono_torch.kernels.decode import choose, draw, project
from unisono_torch.kernels.mom_gru import operator
from unisono_torch.ops import dispatch

PRESETS = "lat-base", "transformer-base", "mamba-130m", "s4d-base", "infinityformer-base", "cram-paper", "maru"


class Absent:
    """A driver of an H100 that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(Absent())  # pyright: ignore[reportArgumentType]
    compiled = set()

    def launched(self: Any, grid: object) -> Any:
        def compile_only(*args: Any, **how: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **how)
            assert kernel.asm["cubin"]
            if kernel.hash not in compiled:
                compiled.add(kernel.hash)
                if "-v" in sys.argv:
                    print(self.__name__, kernel.metadata.shared, flush=True)

        return compile_only

    triton.JITFunction.__getitem__ = launched
    dispatch.available = registry.available = fused.available = lambda device: True  # pyright: ignore[reportPrivateImportUsage]
    project.early = lambda device: True
    operator._multiprocessors = lambda device: 132
    for name in PRESETS:
        config = preset(name)
        config = config.replace(n_layers=1, vocab_size=64)
        for batch in (1, project.MOST + 1):
            model = create(config, dtype="bfloat16", implementation="triton")
            with torch.no_grad():
                made = fused.fused(model, model.init_state(batch, 2048), Held())
                assert made is not None, name
                made[1](torch.zeros(batch, dtype=torch.int64))
    number, scalar = torch.tensor(0), torch.tensor(1.0, dtype=torch.float64)
    ids, ties, bad = (torch.zeros((1, 2), dtype=kind) for kind in (torch.int64, torch.bool, torch.int32))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        logits, token, u = torch.zeros((2, 50257), dtype=dtype), torch.zeros(2, dtype=torch.int64), torch.zeros((1, 2), dtype=torch.float64)
        if dtype != torch.float64:
            choose.choose(logits, number, ids, ties, bad, token)
        draw.draw(logits, u, scalar, number, scalar, number, ids, ties, bad, token)
    print(f"{len(compiled)} compiled")


if __name__ == "__main__":
    main()
