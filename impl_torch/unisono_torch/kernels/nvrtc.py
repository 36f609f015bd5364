"""CUDA C++ compiled on the user's machine by NVRTC, which PyTorch's wheels bring along: no toolkit and no compiler of the user's.

torch.cuda's own way to NVRTC asks for a toolkit's headers, and is private.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import sys
from collections.abc import Sequence

import torch

OPTIONS = ("--std=c++17",)
SHARED_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the CUDA that torch was built with, or None."""
    if torch.version.cuda is None or not sys.platform.startswith("linux"):
        return None
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    # torch's wheels: nvidia/cu13/lib, nvidia/cuda_nvrtc/lib; a toolkit's are found by name
    site = os.path.dirname(os.path.dirname(torch.__file__))
    for place in (name, *sorted(glob.glob(os.path.join(site, "nvidia", "*", "lib", name)))):
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    return None


def compiled(source: str, architecture: str) -> bytes:
    """The machine code of `source` for an `architecture` such as "sm_90". A RuntimeError has the compiler's log."""
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    _ask(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"unisono.cu", 0, None, None))
    options = [f"--gpu-architecture={architecture}".encode(), *(each.encode() for each in OPTIONS)]
    size = ctypes.c_size_t()
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {log.value.decode()}")
        _ask(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _ask(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _ask(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC or the CUDA driver answers with error {result}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class Kernel:
    """A kernel of a loaded module, launched on torch's current stream."""

    def __init__(self, module: Module, name: str, shared: int, cooperative: bool = False):
        self.module = module  # kept alive
        self.cooperative = cooperative  # all its programs at once
        self.shared = shared  # bytes
        self.function = ctypes.c_void_p()
        _ask(_driver().cuModuleGetFunction(ctypes.byref(self.function), module.handle, name.encode()))
        _ask(_driver().cuFuncSetAttribute(self.function, SHARED_LIMIT, shared))
        _ask(_driver().cuFuncSetAttribute(self.function, CARVEOUT, 100))

    def __call__(self, programs: int, threads: int, arguments: Sequence[torch.Tensor | int | None]) -> None:
        """Tensors as pointers, None as a null pointer, integers as int."""
        slots = [each if isinstance(each, int) else 0 if each is None else each.data_ptr() for each in arguments]
        values = (ctypes.c_int64 * len(slots))(*slots)  # an int is its first four bytes
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(slots))(*range(first, first + 8 * len(slots), 8))
        # the stream's number as Triton asks for it, without an object around it
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))  # pyright: ignore[reportAttributeAccessIssue]
        grid = self.function, programs, 1, 1, threads, 1, 1, self.shared, stream, pointers
        _ask(_driver().cuLaunchCooperativeKernel(*grid) if self.cooperative else _driver().cuLaunchKernel(*grid, None))


class Module:
    """Compiled source in the current device's context."""

    def __init__(self, source: str):
        torch.cuda.current_stream()  # torch makes the context
        major, minor = torch.cuda.get_device_capability()
        code = compiled(source, f"sm_{major}{minor}")
        self.handle = ctypes.c_void_p()
        _ask(_driver().cuModuleLoadData(ctypes.byref(self.handle), code))

    def constant(self, name: str) -> int:
        """An int of the source."""
        place, size, value = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_int()
        _ask(_driver().cuModuleGetGlobal_v2(ctypes.byref(place), ctypes.byref(size), self.handle, name.encode()))
        _ask(_driver().cuMemcpyDtoH_v2(ctypes.byref(value), place, size))
        return value.value
