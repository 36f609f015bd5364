"""Files that others made: what they declare is compared with their config before anything of that size is read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save
from unisono_spec.contract import ARCHITECTURES, InputError, config_class, config_from_dict, config_to_dict, init_params, preset
from unisono_spec.contract.aside import aside, written
from unisono_spec.contract.files import load_params, load_state, save_arrays, save_params, save_state, write_bytes
from unisono_spec.contract.memory import memory
from unisono_spec.contract.plain import MAX_DEPTH, read_json
from unisono_spec.models import create

ADAPTIVE = preset("cram-1m", d_model=4, n_layers=1)
SIZES = [
    (arch, name)
    for arch in ARCHITECTURES
    for name, value in config_class(arch)().to_dict().items()
    if type(value) is int and name != "seed"
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_params(path, ADAPTIVE, init_params(ADAPTIVE))
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    save_state(path, ADAPTIVE, create(ADAPTIVE).init_state(2))
    return path


def _header(path: Path, change) -> None:
    """Rewrite a file's header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + size].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.bool_, np.complex64])
def test_weights_are_floats(file: Path, dtype) -> None:
    params = load_file(file)
    save_arrays(file, {**params, "norm.bias": params["norm.bias"].astype(dtype)}, ADAPTIVE, "params")
    with pytest.raises(InputError, match=r"norm\.bias"):
        load_params(file)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_of_every_float_dtype(file: Path, dtype) -> None:
    save_params(file, ADAPTIVE, {name: a.astype(dtype) for name, a in init_params(ADAPTIVE).items()})
    assert {a.dtype for a in load_params(file)[1].values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_and_states_are_finite(file: Path, state: Path, value) -> None:
    for path, kind, load, write in ((file, "params", load_params, save_params), (state, "state", load_state, save_state)):
        arrays = load_file(path)
        name = next(n for n, a in arrays.items() if a.dtype.kind == "f")
        arrays[name].flat[0] = value
        save_arrays(path, arrays, ADAPTIVE, kind)
        with pytest.raises(InputError, match=f"{name} holds NaN or infinite"):
            load(path)
        with pytest.raises(InputError, match=f"{name} holds NaN or infinite"):
            write(path.with_name("new"), ADAPTIVE, arrays)
    assert not path.with_name("new").exists()


@pytest.mark.parametrize("position", [-1, -(2**31), 2**31, 2**40])
def test_positions_are_int32(state: Path, position) -> None:
    arrays = load_file(state)
    save_arrays(state, {**arrays, "position": np.array([0, position])}, ADAPTIVE, "state")
    with pytest.raises(InputError, match=f"position is {position}"):
        load_state(state)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int32, np.complex64, np.bool_])
def test_states_are_wide(state: Path, dtype) -> None:
    arrays = load_file(state)
    narrow = {**arrays, "layers.0.xi": arrays["layers.0.xi"].astype(dtype)}
    save_arrays(state, narrow, ADAPTIVE, "state")
    with pytest.raises(InputError, match=r"layers\.0\.xi"):
        load_state(state)
    with pytest.raises(InputError, match=r"layers\.0\.xi has dtype .*expected float32 or wider"):
        save_state(state, ADAPTIVE, {**narrow, "layers.0.xi": arrays["layers.0.xi"].astype(np.float16)})


def test_rows_of_a_state_are_as_many_everywhere(state: Path) -> None:
    arrays = load_file(state)
    save_arrays(state, {**arrays, "position": np.zeros(3, np.int32)}, ADAPTIVE, "state")
    with pytest.raises(InputError, match="has shape"):
        load_state(state)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda text: text.replace('"norm.bias":', '"norm.weight":'), "'norm.weight' is given twice"),
        (lambda text: text.replace('"kind":"params"', '"kind":"params","kind":"params"'), "'kind' is given twice"),
        (lambda text: text.replace('"dtype":"F32"', '"dtype":"F8_E4M3"', 1), "F8_E4M3"),
        (lambda text: text.replace('"shape":[4]', '"shape":[-4]', 1), "save it as"),
        (lambda text: text.replace('"shape":[4]', '"shape":[1e3]', 1), "list of integers"),
        (lambda text: text.replace('"shape":[4]', f'"shape":[{10**30}]', 1), "an integer of"),
        (lambda text: text.replace('"shape":[4]', '"shape":[4,4]', 1), "has shape"),
        (lambda text: text.replace('"data_offsets"', '"offsets"', 1), "no such field"),
        (lambda text: "[" * 50000 + "]" * 50000, f"more than {MAX_DEPTH} deep"),
        (lambda text: '{"__metadata__":[]}', "not names with arrays"),
        (lambda text: "[1, 2]", "not names with arrays"),
        (lambda text: '{"__metadata__":{"format":"unisono","version":"1","kind":"params"}}', "its config"),
        (lambda text: "{}", "not one of unisono's"),
        (lambda text: "NaN", "NaN is not a number"),
    ],
)
def test_damaged_headers_are_refused(file: Path, change, word) -> None:
    _header(file, change)
    with pytest.raises(InputError) as error:
        load_params(file)
    assert word in str(error.value)
    assert str(file) in str(error.value)


def test_a_header_of_any_size_is_said_to_be_wrong(file: Path) -> None:
    data = file.read_bytes()
    for size in (0, 1, len(data), 2**25 + 1, 2**63, 2**64 - 1):
        file.write_bytes(size.to_bytes(8, "little") + data[8:])
        with pytest.raises(InputError, match="not a readable"):
            load_params(file)


@pytest.mark.parametrize(("arch", "name"), SIZES)
@pytest.mark.parametrize("value", [10**9, 2**31, 10**400])
def test_no_size_is_built_before_it_is_judged(arch: str, name: str, value: int) -> None:
    """An error at once and in no memory, when the config is made or when a model is."""
    tracemalloc.start()
    try:
        for make in (lambda: config_from_dict({"arch": arch, name: value}), lambda: config_class(arch)(**{name: value})):
            with contextlib.suppress(InputError):
                config = make()
                if sum(math.prod(p.shape) for p in config.params().values()) * 4 > memory():
                    with pytest.raises(InputError, match="memory"):
                        init_params(config)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="memory"):
        create(preset("cram-demo", d_model=4, n_layers=0)).init_state(10**15)
    with pytest.raises(InputError, match="memory"):
        create(preset("transformer-1m", n_layers=1)).init_state(1, 2**31 - 1)


def test_a_config_in_a_file_is_judged_like_any_other(file: Path) -> None:
    for changes, word in (({"n_layers": 10**9}, "n_layers: 1000000000"), ({"d_model": "4"}, "d_model"), ({"arch": [1]}, "arch")):
        metadata = {"format": "unisono", "version": "1", "kind": "params"}
        config = json.dumps({**config_to_dict(ADAPTIVE), **changes})
        file.write_bytes(save({"a": np.zeros(1)}, {**metadata, "config": config}))
        with pytest.raises(InputError, match=word):
            load_params(file)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 20000 + "]" * 20000, "deep"),
        ('{"a":' * 20000 + "1" + "}" * 20000, "deep"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"b": {"a": 1, "a": 1}}', "twice"),
        ("1" * 5000, "JSON"),
        (str(2**63), "bits"),
        ("NaN", "NaN"),
        ("[-Infinity]", "Infinity"),
        ("[" + "1," * 600_000 + "1]", "bytes"),
        ("", "JSON"),
        ("{", "JSON"),
        ('"\\u0000"', "NUL"),
        (b"\xff\xfe\xff", "JSON"),
    ],
)
def test_json_is_bounded(text, word) -> None:
    with pytest.raises(InputError) as error:
        read_json(text, "somewhere", "remedy")
    assert word in str(error.value)
    assert "somewhere" in str(error.value)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path: Path, mask) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "file", b"1")
        with aside(tmp_path / "folder", folder=True) as draft:
            assert stat.S_IMODE(draft.stat().st_mode) == 0o777 & ~mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


KILLED = """
import os, signal, sys
from pathlib import Path
from unisono_spec.contract.aside import aside, written
with written(Path(sys.argv[1]) / "file") as file, aside(Path(sys.argv[1]) / "folder", folder=True) as folder:
    file.write(b"half")
    (folder / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    with aside(tmp_path / "file") as living:
        living.write_bytes(b"mine")
        with written(tmp_path / "file") as file:
            file.write(b"whole")
        assert living.read_bytes() == b"mine"
    with aside(tmp_path / "folder", folder=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a device, a pipe or a socket"), written(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1
