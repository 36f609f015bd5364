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

import pytest
from unisono_spec.contract import InputError
from unisono_tools.data import hub, load_corpus, load_tokenizer, registry
from unisono_tools.data.sources import open_source

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
    assert sum(load_corpus("made", cache=tmp_path / "cache").sizes.values()) == len(PROSE)
    assert len(calls) == 2


def test_fasta_keeps_the_bases_only(offer, tmp_path: Path):
    offer("made", "fasta", {"x.fa.gz": gzip.compress(b">chr1 made\nacgtN\nACG\n>chr2\nTT\n")})
    source = open_source("made", cache=tmp_path / "cache")
    assert [b"".join(source.read(i, 0, int(size))) for i, size in enumerate(source.sizes)] == [b"ACGTNACG", b"TT"]


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


def test_a_tokenizer_refuses_what_is_not_text(small_bpe, tmp_path: Path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"a" * 30 + "Grüße".encode("latin-1") + b"b" * 900)
    with pytest.raises(InputError, match=r"latin1\.txt: byte 32 is not UTF-8"):
        load_corpus(path, "gpt2", cache=tmp_path / "cache")


def _hub(monkeypatch: pytest.MonkeyPatch, found) -> list:
    """Put a `datasets` in place whose `load_dataset` gives what `found` returns; what it was asked for."""
    module, asked = ModuleType("datasets"), []
    module.load_dataset = lambda *args, **kwargs: asked.append(args) or found()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_hub_sets_are_read_by_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    rows = [{"text": "ab" * 50}, {"text": ""}, {"text": "cd" * 50}, {"text": "e" * 10_000}]
    asked = _hub(monkeypatch, lambda: iter(rows))
    text = load_corpus("wikitext-103-raw-v1", limit=1200, cache=tmp_path)
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1")]
    assert sum(text.sizes.values()) == 1200
    # read once
    assert load_corpus("wikitext-103-raw-v1", limit=1200, cache=tmp_path).digest == text.digest
    assert len(asked) == 1

    def unreachable():
        raise OSError("no route")

    _hub(monkeypatch, unreachable)
    with pytest.raises(InputError, match=r"no route.*check the network"):
        load_corpus("imdb", cache=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'unisono\[data\]'"):
        load_corpus("imdb", cache=tmp_path)
    assert dataclasses.is_dataclass(hub.HubSet)


def test_any_hub_set_with_its_own_splits_and_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def rows(letter: str, number: int) -> list:
        return [{"doc": {"body": f"{letter}{i:03}"}} for i in range(number)]

    splits = {"train": rows("t", 40), "validation": rows("v", 3), "test": rows("x", 2)}
    asked = _hub(monkeypatch, lambda: splits)
    text = load_corpus("hf:someone/set:small:doc.body", cache=tmp_path)
    assert asked == [("someone/set", "small")]
    assert bytes(text.validation) == b"v000v001v002"
    assert bytes(text.test) == b"x000x001"
    assert len(text.documents["train"]) == 40
    # 5 % of the training documents stand in for a split that the set lacks
    del splits["validation"]
    text = load_corpus("hf:someone/other", field="doc.body", cache=tmp_path)
    assert bytes(text.validation) == b"t038t039"
    assert bytes(text.train[-4:]) == b"t037"
    with pytest.raises(InputError, match=r"has no field 'text'; Valid: doc; .*data\.field"):
        load_corpus("hf:someone/third", cache=tmp_path)
    with pytest.raises(InputError, match="hf:owner/name:config:field"):
        load_corpus("hf:a/b:c:d:e", cache=tmp_path)


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
    assert commands[1] == ["/usr/bin/npm", "pack", "--loglevel=warn", "gensim@4.4.0"]
