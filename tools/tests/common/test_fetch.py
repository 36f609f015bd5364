"""Pinned sets, fetched from a local stand-in of the registries: no network."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from unisono_spec.contract import InputError
from unisono_tools.data import hub, load_corpus, load_tokenizer, registry, tokenizers

PROSE = ("To be prepared for war is one of the most effectual means of preserving peace.\n" * 30).encode()


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Put a set into the table whose package, made here, "downloads" from a folder; returns how often that happened."""

    def make(name: str, kind, files: dict[str, bytes], archive: str = "made-1.0-py3-none-any.whl") -> list[str]:
        calls: list[str] = []
        path = tmp_path / archive
        if path.suffix == ".whl":
            with zipfile.ZipFile(path, "w") as wheel:
                for inner, data in files.items():
                    wheel.writestr(f"made/{inner}", data)
        else:
            with tarfile.open(path, "w:gz") as tar:
                for inner, data in files.items():
                    member = tarfile.TarInfo(f"package/{inner}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        hashes = {inner: hashlib.sha256(data).hexdigest() for inner, data in files.items()}
        monkeypatch.setitem(registry.SETS, name, registry.FetchedSet("pypi", "made", "1.0", hashes, "MIT", kind, "made here"))

        def download(entry: registry.FetchedSet, folder: Path) -> Path:
            calls.append(entry.package)
            return path

        monkeypatch.setattr(registry, "download", download)
        return calls

    return make


@pytest.mark.parametrize("archive", ["made-1.0-py3-none-any.whl", "made-1.0.tgz"])
def test_a_set_is_fetched_once_and_cached(offer, tmp_path: Path, archive):
    calls = offer("made", "bz2", {"text.bz2": bz2.compress(PROSE)}, archive)
    for _ in range(2):
        text = load_corpus("made", cache=tmp_path / "cache")
        assert len(text.train) + len(text.validation) + len(text.test) == len(PROSE)
    assert calls == ["made"]


def test_another_file_than_the_pinned_one_is_refused(offer, tmp_path: Path):
    offer("made", "text", {"text": PROSE})
    registry.SETS["made"].files["text"] = "0" * 64
    with pytest.raises(InputError, match="not the pinned file"):
        load_corpus("made", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("text"))


def test_a_damaged_cache_is_fetched_again(offer, tmp_path: Path):
    calls = offer("made", "text", {"text": PROSE})
    (path,) = registry.fetch("made", tmp_path / "cache")
    path.write_bytes(b"cut")
    assert len(registry.read("made", tmp_path / "cache")) == len(PROSE)
    assert len(calls) == 2


def test_fasta_keeps_the_bases_only(offer, tmp_path: Path):
    offer("made", "fasta", {"x.fa.gz": gzip.compress(b">chr1 made\nacgtN\nACG\n>chr2\nTT\n")})
    assert bytes(registry.read("made", tmp_path / "cache")) == b"ACGTNACGTT"


def test_without_a_network_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(registry, "_pip", lambda: [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(InputError, match="check the network"):
        load_corpus("enwiki-6m", cache=tmp_path)


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="apt-get, which is not installed"):
        registry.fetch("ecoli", tmp_path)


def test_every_pinned_set_is_complete():
    for name, entry in registry.SETS.items():
        assert entry.licence, name
        assert entry.version or entry.registry == "debian", name
        assert all(len(sha) == 64 for sha in entry.files.values()), name


@pytest.fixture
def small_bpe(offer):
    """A BPE of bytes and one merge in the place of GPT-2's."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocab["th"] = len(vocab)
    offer("gpt2-bpe", "tokenizer", {"encoder.json": json.dumps(vocab).encode(), "vocab.bpe": b"#version: 0.2\nt h\n"})
    return vocab


def test_bpe_round_trips_and_counts_bytes(small_bpe, tmp_path: Path):
    coder = load_tokenizer("gpt2", tmp_path / "cache")
    ids = coder.encode("the päth")
    assert small_bpe["th"] in ids
    assert coder.decode(ids) == "the päth"
    path = tmp_path / "text.txt"
    path.write_bytes(PROSE)
    text = load_corpus(path, "gpt2", cache=tmp_path / "cache")
    assert text.sizes["train"] == round(0.9 * len(PROSE))
    assert text.bytes_per_token("train") > 1


def test_pieces_of_a_long_text_are_tokenized_as_the_whole(small_bpe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    coder = load_tokenizer("gpt2", tmp_path / "cache")
    data = np.frombuffer("one\n\nthe two  \n three\nthat's é\nend\n".encode() * 50, np.uint8)
    whole = coder.encode_bytes(data, "text")
    monkeypatch.setattr(tokenizers, "PIECE", 40)
    assert len(tokenizers._texts(data, "text")) > 10
    assert np.array_equal(coder.encode_bytes(data, "text"), whole)


def test_a_tokenizer_refuses_what_is_not_text(small_bpe, tmp_path: Path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"a" * 30 + "Grüße".encode("latin-1") + b"b" * 900)
    with pytest.raises(InputError, match=r"latin1\.txt: byte 32 is not UTF-8"):
        load_corpus(path, "gpt2", cache=tmp_path / "cache")


def test_hub_sets_are_read_by_document(monkeypatch: pytest.MonkeyPatch):
    module = ModuleType("datasets")
    rows = [{"text": "ab" * 50}, {"text": ""}, {"text": "cd" * 50}, {"text": "e" * 10_000}]
    asked = []
    module.load_dataset = lambda *args, **kwargs: asked.append(args) or iter(rows)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)
    text = load_corpus("wikitext-103-raw-v1", limit=1200)
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1")]
    assert sum(text.sizes.values()) == 1200
    module.load_dataset = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no route"))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match=r"no route.*check the network"):
        load_corpus("imdb")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        load_corpus("imdb")
    assert dataclasses.is_dataclass(hub.HubSet)


def test_npm_and_pypi_are_asked_for_the_pinned_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    commands = []

    def pretend(command, cwd, **kwargs):
        commands.append(command)
        (Path(cwd) / "made.tgz").write_bytes(b"")

    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    entry = registry.SETS["enwiki-6m"]
    assert registry.download(entry, tmp_path).name == "made.tgz"
    registry.download(dataclasses.replace(entry, registry="npm"), tmp_path)
    assert commands[0][-1] == "gensim==4.4.0"
    assert "--no-deps" in commands[0]
    assert commands[1] == ["/usr/bin/npm", "pack", "gensim@4.4.0"]
