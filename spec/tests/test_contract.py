"""Files, inputs, sampling and elementwise functions: what is accepted, what is refused and in which words."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path

import checking
import numpy as np
import pytest
from safetensors.numpy import save
from unisono_spec.contract import InputError, config_class, config_from_dict, config_to_dict, init_params, preset
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.files import load_params, load_state, save_params, save_state, write_bytes
from unisono_spec.models import create
from unisono_spec.ops import elementwise

CONFIG = CRAMConfig(d_model=4, n_layers=1, vocab_size=7, code_bits=3)
X = np.array([-40.0, -7.0, -1.0, -1e-8, 0.0, 1e-8, 0.5, 3.0, 40.0])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_params(path, CONFIG, init_params(CONFIG))
    return path


def test_round_trip(file: Path, tmp_path: Path) -> None:
    config, params = load_params(file)
    assert config == CONFIG == config_from_dict(config_to_dict(CONFIG))
    for name, a in init_params(CONFIG).items():
        assert params[name].tobytes() == a.tobytes()
    state = create(CONFIG, params).forward(np.array([[1, 2, 3]]))[1]
    save_state(tmp_path / "state.safetensors", CONFIG, state)
    assert load_state(tmp_path / "state.safetensors")[1]["xi"].tobytes() == state["xi"].tobytes()


def test_damaged_files_are_refused(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for name, content, word in (
        ("truncated", data[: len(data) // 2], "truncated"),
        ("empty", b"", "not a readable"),
        ("foreign", save({"a": np.zeros(2)}), "not one of unisono's"),
        ("text", b"once upon a time" * 9, "not a readable"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError, match=word):
            load_params(path)
    with pytest.raises(InputError, match="no such file"):
        load_params(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match=r"a folder; give the file in it, such as .*model\.safetensors"):
        load_params(tmp_path)
    with pytest.raises(InputError, match="expected 'state'"):
        load_state(file)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".", "a folder; name a file in it"),
        (None, "path: None has type NoneType"),
        ("a" * 300, "cannot be written"),
        ("a\0b", "no file's name"),
        ("\ud800", "no file's name"),
    ],
)
def test_a_file_needs_a_name(path, words: str) -> None:
    with pytest.raises(InputError, match=words):
        save_params(path, CONFIG, init_params(CONFIG))


def test_wrong_parameters_are_refused(tmp_path: Path) -> None:
    params = init_params(CONFIG)
    renamed = {name.replace("head.weight", "haed.weight"): a for name, a in params.items()}
    missing = {name: a for name, a in params.items() if name != "norm.bias"}
    reshaped = {**params, "head.weight": params["head.weight"].T}
    for wrong, word in ((renamed, "did you mean 'head.weight'"), (missing, "'norm.bias' is missing"), (reshaped, "has shape")):
        with pytest.raises(InputError, match=word):
            save_params(tmp_path / "x.safetensors", CONFIG, wrong)
        with pytest.raises(InputError, match=word):
            create(CONFIG, wrong)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_bytes(file, b"other")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("tokens", "marks", "word"),
    [
        (np.zeros((1, 0), int), {}, "T is 0"),
        (np.zeros((3,), int), {}, "expected"),
        (np.zeros((1, 3)), {}, "expected"),
        (np.array([[0, 7]]), {}, "id 7 is outside"),
        (np.array([[-1, 0]]), {}, "id -1 is outside"),
        (np.zeros((1, 3), int), {"reset": np.zeros((1, 2), bool)}, "reset"),
        (np.zeros((1, 3), int), {"valid": np.ones((1, 3))}, "valid"),
        (np.zeros((1, 3), int), {"state": {"xi": np.zeros((2, 3))}}, "xi has shape"),
        (np.zeros((1, 3), int), {"state": {}}, "'xi' is missing"),
    ],
)
def test_bad_inputs_are_refused(tokens: np.ndarray, marks: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        create(CONFIG).forward(tokens, **marks)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'cram-1m'"):
        preset("cram1m")
    with pytest.raises(InputError, match="did you mean 'cram'"):
        config_class("carm")
    with pytest.raises(InputError, match="arch: missing"):
        config_from_dict({"d_model": 4})


def test_elementwise_by_scalar_formulas() -> None:
    """Each function at single numbers, written with math's functions."""
    checking.same(elementwise.sigmoid(X), np.array([0.5 * (1 + math.tanh(v / 2)) for v in X]))
    checking.same(elementwise.sigmoid(X), np.array([1 / (1 + math.exp(-v)) for v in X]))
    cubic = [math.sqrt(2 / math.pi) * (v + 0.044715 * v**3) for v in X]
    checking.same(elementwise.gelu_tanh(X), np.array([0.5 * v * (1 + math.tanh(c)) for v, c in zip(X, cubic, strict=True)]))
    mean = math.fsum(X) / len(X)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in X) / len(X) + 1e-5)
    checking.same(elementwise.layer_norm(X, np.full(9, 2.0), np.full(9, 3.0)), np.array([(v - mean) / spread * 2 + 3 for v in X]))
    numbers = np.array([0, 1, 6, 37, 2**20 - 1])
    digits = elementwise.binary_digits(numbers, 20, np.dtype(float))
    assert ["".join(str(int(d)) for d in row) for row in digits] == [f"{n:020b}" for n in numbers]
    assert elementwise.binary_digits(np.array([9]), 2, np.dtype(float)).tolist() == [[0, 1]]  # the last digits: modulo 2^digits


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elementwise_keeps_the_dtype_and_stays_finite(dtype: str) -> None:
    huge = np.array([-1e4, -100, 0, 100, 1e4], dtype)
    for f in (elementwise.sigmoid, elementwise.gelu_tanh):
        assert f(huge).dtype == dtype
        assert np.isfinite(f(huge)).all()


def test_elementwise_derivatives() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5))
    for f in (elementwise.sigmoid, elementwise.gelu_tanh):
        checking.complex_step(f, x, rng)
    checking.complex_step(lambda args: elementwise.layer_norm(*args), (x, rng.normal(size=5), rng.normal(size=5)), rng)


def test_generation_is_forward_and_step() -> None:
    """Greedy continuation equals the argmax of whole forward passes."""
    model, prompt = create(CONFIG, seed=3), np.array([[1, 2], [3, 4]])
    found = model.generate(prompt, 6).tokens
    tokens = prompt
    for _ in range(6):
        tokens = np.concatenate([tokens, model.forward(tokens)[0][:, -1].argmax(-1)[:, None]], 1)
    assert np.array_equal(tokens[:, 2:], found)


def test_the_distribution_says_its_version() -> None:
    import unisono

    assert unisono.__version__ == importlib.metadata.version("unisono")
