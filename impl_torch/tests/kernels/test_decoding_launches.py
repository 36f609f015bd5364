"""How many kernels a layer's token takes: Triton's and those of plain operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from unisono_conformance import judge
from unisono_spec.contract import preset
from unisono_torch import create
from unisono_torch.decoding import parts
from unisono_torch.decoding.fused import fused
from unisono_torch.decoding.parts import Held
from unisono_torch.kernels.decode import project, slabs, tiles
from unisono_torch.kernels.decode.project import MOST

from .test_decoding import CONFIGS, HOW, PLAIN, in_pieces, text

MADE = ("empty", "new_empty", "empty_like", "empty_strided")


class Counted(TorchDispatchMode):
    """Launches of Triton's interpreter, and operations that make numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.within = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.within and not func.is_view and func._schema.name.removeprefix("aten::") not in MADE:
            self.count += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def launch(self) -> Iterator[None]:
        self.count, self.within = self.count + 1, True
        yield
        self.within = False


def launches(name: str, layers: int, monkeypatch: pytest.MonkeyPatch, dtype: str = "float32") -> int:
    from triton.runtime.interpreter import GridExecutor

    config = CONFIGS[name].replace(n_layers=layers, **({"attention": KINDS[name][-layers:]} if name in KINDS else {}))
    model = create(config, implementation=HOW.get(name, "auto"), dtype=dtype)
    call, counted = GridExecutor.__call__, Counted()

    def one(self: GridExecutor, *given: Any, **named: Any) -> None:
        with counted.launch():
            call(self, *given, **named)

    with torch.no_grad(), monkeypatch.context() as here:
        made = fused(model, model.init_state(2, 8), Held())
        assert made is not None
        token = torch.as_tensor(text(1)[:, 0])
        made[1](token)  # which makes what stays
        here.setattr(GridExecutor, "__call__", one)
        with counted:
            made[1](token)
    return counted.count


KINDS = {"taylor2": ("conv", "linear"), "learned": ("softmax", "linear"), "rope": ("linear", "linear")}
CASES = [name for name in CONFIGS if name not in (*PLAIN, "exclusive", "maru")]  # others stand for these
FEWER = {"fixed": 2}
MORE = {("stack", "tiles"): 5, ("after", "tiles"): 5}  # what a layer leaves has no norm yet: no form of MARU's or of CRAM's


@pytest.mark.parametrize(("most", "form"), [(MOST, ""), (1, "slabs"), (1, "tiles"), (1, "fronts")])
@pytest.mark.parametrize("name", CASES)
def test_four_launches_a_layer(name: str, most: int, form: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few sequences, and of many whose products are joined."""
    if name == "wide":
        in_pieces(monkeypatch)
    monkeypatch.setattr(project, "MOST", most)
    monkeypatch.setattr(parts, "joined", lambda model, batch: form)
    found = launches(name, 2, monkeypatch) - launches(name, 1, monkeypatch)
    judge.same(float(found), float(MORE.get((name, form), FEWER.get(name, 4))))


def test_four_launches_in_16_bits(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters in float32, whose weights and biases are cast once."""
    monkeypatch.setattr(project, "MOST", 1)
    monkeypatch.setattr(parts, "joined", lambda model, batch: "fronts")
    found = (launches("lat", layers, monkeypatch, "bfloat16") for layers in (2, 1))
    judge.same(float(next(found) - next(found)), 4.0)


def test_four_launches_of_rows_that_slabs_do_not_hold(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "MOST", 1)
    monkeypatch.setattr(slabs, "LONGEST", 8)
    monkeypatch.setattr(parts, "joined", lambda model, batch: "slabs")
    judge.same(float(launches("lat", 2, monkeypatch) - launches("lat", 1, monkeypatch)), 4.0)


def test_four_launches_between_a_librarys_products(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Mamba."""
    monkeypatch.setattr(project, "MOST", 1)
    monkeypatch.setattr(parts, "joined", lambda model, batch: "")
    judge.same(float(launches("mamba", 2, monkeypatch) - launches("mamba", 1, monkeypatch)), 4.0)


MEASURED = {
    "lat-base": ["", "slabs", "slabs", "slabs", "fronts"],
    "mamba-130m": ["", "slabs", "slabs", "tiles", ""],
    "infinityformer-base": ["", "slabs", "slabs", "fronts", "fronts"],
    "s4d-base": ["", "slabs", "slabs", "slabs", "tiles"],
    "maru": ["", "", "fronts", "fronts", "fronts"],
}


def test_products_are_joined_where_that_was_measured() -> None:
    models = {name: create(preset(name).replace(n_layers=1, vocab_size=8), dtype="bfloat16") for name in MEASURED}
    assert {name: [parts.joined(model, batch) for batch in (2, 3, 32, 64, 256)] for name, model in models.items()} == MEASURED
    for arch, width, dtype in itertools.product(("lat", "mamba", "maru"), (640, 4096), (torch.bfloat16, torch.float32)):
        model: Any = SimpleNamespace(config=SimpleNamespace(arch=arch, d_model=width), compute_dtype=dtype, device=torch.device("cpu"))
        assert [bool(parts.joined(model, batch)) for batch in (1, 2, 65, 256)] == [
            False,
            False,
            *2 * [arch != "mamba" or dtype.itemsize > 2],
        ]


def test_programs_that_wait_for_each_other_fit_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """S4D's rows of 512 are 32 programs' at most: where there are fewer multiprocessors, nothing waits for what cannot begin."""
    model = SimpleNamespace(config=preset("s4d-base"), compute_dtype=torch.bfloat16, device=torch.device("cuda"))
    for count, fits in ((31, False), (32, True), (132, True)):
        monkeypatch.setattr(parts, "_multiprocessors", lambda device, count=count: count, raising=False)
        assert (parts.joined(model, 256) == "tiles") == fits  # pyright: ignore[reportArgumentType]


def test_tiles_fit_smaller_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KiB of shared memory a program, for pieces on their way; and each tile is of tensor cores' shapes."""
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    sizes = itertools.product((5, 16, 40, 256, 65535), (1, 80, 512, 2048, 8192), (8, 100, 1024, 8192), (False, True), (2, 4))
    for m, n, k, paired, size in sizes:
        for tile in (cut(m, n, k, paired, size) for cut in (tiles.tile, tiles.tile_after)):
            assert (tile.tall + tile.wide * (1 + paired)) * tile.deep * size * tile.stages <= 99 << 10
            assert min(tile.tall, tile.deep) >= 16
            assert tile.wide >= parts.NARROWEST
