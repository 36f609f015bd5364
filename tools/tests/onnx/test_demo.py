"""The demo, end to end, on a text of a few kilobytes and a few steps."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import unisono_spec
from rich.console import Console
from rich.table import Table
from unisono_spec.contract import preset
from unisono_spec.contract.files import load_params
from unisono_tools.backends import open_reader
from unisono_tools.data import load_corpus
from unisono_tools.experiments import demo
from unisono_tools.train.logs import read


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text.txt"
    words = np.random.default_rng(0).choice(["the", "people", "of", "these", "United", "States", "and", "peace"], 3000)
    text.write_text(" ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(Console, "print", lambda self, *args, **kwargs: printed.append(args[0] if args else ""))
        assert demo.main(["--out", str(folder / "demo"), "--corpus", str(text), "--steps", "3", "--greedy_tokens", "12"]) == 0
    tables = [p for p in printed if isinstance(p, Table)]
    cells = ["\n".join(" ".join(str(cell) for cell in column.cells) for column in table.columns) for table in tables]
    return folder / "demo", "\n".join([str(p) for p in printed] + cells)


def test_it_leaves_what_it_promises(shown: tuple[Path, str]):
    folder, _ = shown
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "xi" / "manifest.json").is_file()
    assert len([row for row in read(folder / "run" / "log.jsonl") if "validation_bits" in row]) == 1
    config, params = load_params(folder / "model.safetensors")
    assert config == preset("cram-demo")
    tokens = np.arange(40)[None]
    expected, _ = unisono_spec.create(config, params).forward(tokens)
    reader = open_reader(folder / "model.onnx", "onnx")
    found, _ = reader.forward(tokens, reader.init_state(1))
    assert reader.tokenizer == "bytes"
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))


def test_it_shows_the_comparison_and_the_agreement(shown: tuple[Path, str]):
    _, text = shown
    for words in ("order 0", "order 5", "xz", "CRAM, after", "NumPy", "PyTorch", "onnxruntime"):
        assert words in text
    assert text.count("the same, 12 bytes") == 3
    shares = [int(share) for share in re.findall(r"\b(\d+)%", text)]
    assert len(shares) == 3
    assert max(shares) <= 100


def test_a_signal_that_ends_its_training_ends_it(shown: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(demo, "train", lambda *_, **__: SimpleNamespace(signal=signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        demo.main(["--out", str(tmp_path), "--corpus", str(shown[0].parent / "text.txt"), "--steps", "3"])


def test_engines_that_disagree_are_an_error(shown: tuple[Path, str], monkeypatch: pytest.MonkeyPatch):
    folder, _ = shown
    readers = {
        engine: open_reader(folder / ("model.onnx" if name == "onnx" else "model.safetensors"), name)
        for engine, name in demo.ENGINES.items()
    }
    text = load_corpus(folder.parent / "text.txt")
    console = Console(quiet=True)
    assert demo._compare(console, folder / "model.safetensors", readers, text, 8)
    plain = readers["onnxruntime"].forward
    monkeypatch.setattr(readers["onnxruntime"], "forward", lambda tokens, state: (plain(tokens, state)[0] * 1.001, state))
    assert not demo._compare(console, folder / "model.safetensors", readers, text, 8)


def test_texts_may_part_where_rounding_decides(shown: tuple[Path, str], monkeypatch: pytest.MonkeyPatch):
    checkpoint = shown[0] / "model.safetensors"
    for margin, said in ((0.0, "the same up to a tie at byte 2"), (1.0, "another")):
        logits = np.full((1, 2, 256), -1.0)
        logits[0, -1, [7, 9]] = margin, 0.0
        monkeypatch.setattr(demo, "_truth", lambda checkpoint, tokens, logits=logits: (logits, np.full((1, 2, 1), 1e-6)))
        assert demo._sameness(checkpoint, [1, 2, 7, 3], [1, 2, 9, 3]) == said
        assert demo._sameness(checkpoint, [1, 2, 7, 3], [1, 2, 7, 3]) == "the same"


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert demo.main(["--seconds", "0", "--out", str(tmp_path)]) == 2
    assert demo.main(["--corpus", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert demo.main(["--hours", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("demo: error:") == 3
    assert "Traceback" not in error
