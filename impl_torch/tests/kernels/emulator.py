"""The selective scan's CUDA sources, compiled by g++ and run thread by thread (device.h)."""

from __future__ import annotations

import ctypes
import hashlib
import pathlib
import re
import subprocess
from collections.abc import Sequence

from torch import Tensor
from unisono_torch.kernels.selective_scan import native

SOURCES = pathlib.Path(native.__file__).parent


class Kernel:
    """What native._kernel gives, on a CPU."""

    def __init__(self, folder: pathlib.Path, name: str, constants: tuple[tuple[str, int], ...]):
        head = "".join(f"#define {each} {value}\n" for each, value in constants)
        files = pathlib.Path(__file__).with_name("device.h"), SOURCES / "common.cu", SOURCES / f"{name}.cu"
        source = files[0].read_text("utf-8") + head + "".join(file.read_text("utf-8") for file in files[1:])
        source = source.replace("extern __shared__ float4 memory[];", "").replace('extern "C" __device__ const', "const")
        parameters = source.rsplit(" scan(", 1)[1].split(") {", 1)[0]
        named = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters.strip()))
        source += f'extern "C" void run(int programs, {parameters}) {{\n  program = [&] {{ scan({named}); }};\n'
        source += "  for (int i = 0; i < programs; ++i) run_block(i);\n}\n"
        written = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.cpp"
        library = written.with_suffix(".so")
        if not library.exists():
            written.write_text(source, encoding="utf-8")
            command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-Wno-unknown-pragmas", str(written), "-o", str(library)]
            subprocess.run(command, check=True)
        self.run = ctypes.CDLL(str(library)).run

    def __call__(self, programs: int, threads: int, arguments: Sequence[Tensor | int | None]) -> None:
        pointers = (
            ctypes.c_int(each) if isinstance(each, int) else ctypes.c_void_p(None if each is None else each.data_ptr())
            for each in arguments
        )
        self.run(ctypes.c_int(programs), *pointers)
