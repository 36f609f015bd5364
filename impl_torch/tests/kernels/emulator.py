"""CUDA sources of kernels, compiled by g++ and run on a CPU, as a header that stands in for a GPU says (device.h, programs.h)."""

from __future__ import annotations

import ctypes
import hashlib
import pathlib
import re
import subprocess
from collections.abc import Sequence

from torch import Tensor


class Kernel:
    """What native._kernel gives: `called` of the file `name` beside native.py, run by the lines `runs` of its call."""

    def __init__(
        self, native: str, stand_in: str, runs: str, called: str, folder: pathlib.Path, name: str, constants: tuple[tuple[str, int], ...]
    ):
        sources = pathlib.Path(native).parent
        head = "".join(f"#define {each} {value}\n" for each, value in constants)
        files = pathlib.Path(__file__).with_name(stand_in), sources / "common.cu", sources / f"{name}.cu"
        source = files[0].read_text("utf-8") + head + "".join(file.read_text("utf-8") for file in files[1:])
        source = source.replace("extern __shared__ float4 memory[];", "").replace('extern "C" __device__ const', "const")
        parameters = source.rsplit(f" {called}(", 1)[1].split(") {", 1)[0]
        named = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters.strip()))
        source += f'extern "C" bool run(int programs, int each, {parameters}) {{\n  {runs.format(f"{called}({named})")}\n}}\n'
        library = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            written = library.with_suffix(".cpp")
            written.write_text(source, encoding="utf-8")
            command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-iquote", str(files[0].parent)]
            command += [str(written), "-o", str(library)]
            subprocess.run(command, check=True)
        self.run = ctypes.CDLL(str(library)).run
        self.run.restype = ctypes.c_bool

    def __call__(self, programs: int, threads: int, arguments: Sequence[Tensor | int | None]) -> None:
        pointers = (ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr()) for a in arguments)
        assert self.run(ctypes.c_int(programs), ctypes.c_int(threads), *pointers), "programs wait for each other for ever"
