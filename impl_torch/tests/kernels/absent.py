"""A GPU that is not there, an H100 unless told: kernels are compiled as they would be launched on it. For a process of its own, without
TRITON_INTERPRET."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a program can have, by compute capability times ten


@dataclasses.dataclass(frozen=True)
class _Driver:
    capability: int

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@dataclasses.dataclass(frozen=True)
class Compiled:
    name: str
    shared: int  # bytes
    registers: int  # a thread
    stack: int  # bytes a thread: what spills, since the kernels have no arrays of their own

    def __str__(self) -> str:
        return f"{self.name}: {self.registers} registers, {self.stack} bytes of stack, {self.shared} of shared memory"


def install(compiled: dict[str, Compiled], capability: int = 90) -> None:
    """From now on what is launched is compiled instead, into `compiled`, where it is not there."""
    driver.set_active(_Driver(capability))  # pyright: ignore[reportArgumentType]

    def launched(self: Any, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 1 or max(grid[1:]) <= 65_535

        def compile_only(*args: Any, **how: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **how)
            if kernel.hash in compiled:
                return
            name = f"{self.__module__.removeprefix('unisono_torch.kernels.')}.{self.__name__}"
            compiled[kernel.hash] = Compiled(name, kernel.metadata.shared, *_used(kernel.asm["cubin"]))
            if "-v" in sys.argv:
                print(compiled[kernel.hash], flush=True)

        return compile_only

    triton.JITFunction.__getitem__ = launched


def finish(compiled: dict[str, Compiled], capability: int = 90) -> None:
    """Says how many there are; exits with 1 where some cannot be launched."""
    large = [each for each in compiled.values() if each.shared > SHARED[capability]]
    print(*(f"does not launch: {each}" for each in large), f"{len(compiled)} compiled", sep="\n")
    if large:
        sys.exit(1)


def _used(code: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a kernel's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        (file := pathlib.Path(folder, "kernel.cubin")).write_bytes(code)
        tool = knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])
