"""MoM-GRU's CUDA kernels with no GPU: what the kernels' own tests ask, by several programs that wait for each other. Needs g++:
`python -m pytest impl_torch/tests/kernels/emulated_gru.py`."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from unisono_torch.kernels.mom_gru import loop, native, operator

from . import test_mom_gru as gru

CASES = [
    gru.Case(2, 6, 11, 2, 5, 6, 7, "separate", drawn=True, marked=True),
    gru.Case(2, 9, 11, 2, 5, 6, 7, marked=True),
    gru.Case(17, 3, 40, 3, 40, 9, 5, marked=True),
    gru.Case(1, 2, 3, 3, 1, 1, 5),
    gru.Case(1, 6, 12, 1, 250, 126, 5),
    gru.Case(3, 5, 20, 1, 40, 8, 33),
]
PROGRAMS = 3


class Kernel:
    """What native._kernel gives, on a CPU."""

    def __init__(self, folder: pathlib.Path, name: str, device: int, constants: tuple[tuple[str, int], ...]):
        sources = pathlib.Path(native.__file__).parent
        head = "".join(f"#define {each} {value}\n" for each, value in constants)
        files = pathlib.Path(__file__).with_name("programs.h"), sources / "common.cu", sources / f"{name}.cu"
        source = files[0].read_text("utf-8") + head + "".join(file.read_text("utf-8") for file in files[1:])
        source = source.replace('extern "C" __device__ const', "const")
        parameters = source.rsplit(f" {name}(", 1)[1].split(") {", 1)[0]
        named = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters.strip()))
        source += f'extern "C" bool run(int programs, int each, {parameters}) {{\n  kernel = [=] {{ {name}({named}); }};\n'
        source += "  return run_all(programs, each, shared_bytes);\n}\n"
        written = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.cpp"
        library = written.with_suffix(".so")
        if not library.exists():
            written.write_text(source, encoding="utf-8")
            command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-Wno-unknown-pragmas", str(written), "-o", str(library)]
            subprocess.run(command, check=True)
        self.run = ctypes.CDLL(str(library)).run
        self.run.restype = ctypes.c_bool

    def __call__(self, programs: int, each: int, arguments: Sequence[Tensor | int | None]) -> None:
        pointers = (ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr()) for a in arguments)
        assert self.run(ctypes.c_int(programs), ctypes.c_int(each), *pointers), "programs wait for each other for ever"


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernel = functools.cache(functools.partial(Kernel, tmp_path_factory.getbasetemp()))
    monkeypatch.setattr(native, "_there", lambda device: True)
    monkeypatch.setattr(native, "_kernel", kernel)
    monkeypatch.setattr(operator, "_multiprocessors", lambda device: PROGRAMS)
    monkeypatch.setattr(native, "COLUMNS", 16)
    monkeypatch.setattr(operator, "SEGMENT", 4)
    monkeypatch.setattr(operator, "interpreted", lambda: False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: gru.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gru, "interpreted", lambda: False)
    gru.test_values_and_gradients(case, "cpu")


def test_marks_pieces_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    gru.test_a_reset_cuts_nan("cpu")
    gru.test_without_gradients_in_pieces_and_launches("cpu", monkeypatch)
    gru.test_the_same_bits_twice("cpu")


@pytest.mark.parametrize("value", [torch.inf, 1e38])
def test_what_exceeds_float32(value: float) -> None:
    """What programs exchange stays infinite, or becomes NaN, where plain operations' does."""
    given, _, sizes = gru.inputs(gru.Case(1, 3, 4, 2, 3, 4, 3), "cpu")
    h, M, x, _, *weights = (a.float() for a in given)
    weights = gru.Weights._make(weights)
    weights.after_bias[:] = value
    found: list[Any] = [how(h, M, x, None, None, None, sizes, weights)[0] for how in (loop, gru.folded)]
    assert torch.equal(found[0].isfinite(), found[1].isfinite())
