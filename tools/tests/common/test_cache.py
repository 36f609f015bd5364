"""Texts as they lie about: damaged, linked, unreadable; a cache that is damaged, or may only be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
from unisono_spec.contract import InputError
from unisono_tools.data import load_corpus, sources, store

NOISE = np.random.default_rng(3).integers(0, 256, 9000, np.uint8).tobytes()
FASTA = b">one\n" + b"ACGT" * 100 + b"\n>two\n" + bytes(NOISE[:3000])


@pytest.mark.parametrize("suffix", [".txt", ".fa", ".jsonl"])
@pytest.mark.parametrize(("ending", "packer"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", ["cut", "foreign", "flipped"])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix, ending, packer, damage):
    """Whether the damage lies before its first document, within it or behind it; a cache that could not be filled is not to blame."""
    text = FASTA if suffix == ".fa" else json.dumps({"text": NOISE.hex()}).encode() if suffix == ".jsonl" else NOISE
    data = packer(text)
    middle = len(data) // 2
    damaged = {"cut": data[:-9], "foreign": text, "flipped": data[:middle] + bytes(200) + data[middle + 200 :]}[damage]
    path = tmp_path / f"text{suffix}{ending}"
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=rf"text\{suffix}\{ending}: (cannot be read \(.+\); check its permissions|line 1 is not JSON)"):
        load_corpus(path, cache=tmp_path / "cache")


def test_a_pattern_finds_each_file_once(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one " * 100)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("two " * 100)
    (tmp_path / "b" / "up").symlink_to("..")
    source = sources.open_source(f"{tmp_path}/**/*.txt")
    assert [source.label(i) for i in range(len(source.sizes))] == [str(tmp_path / "a.txt"), str(tmp_path / "b" / "c.txt")]
    assert len(sources.open_source(str(tmp_path)).sizes) == 2


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch):
    """Its files would be missing, silently. (The superuser may read all: scandir is what refuses.)"""
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("one " * 100)
    real = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"closed: cannot be read \(Permission denied\)"):
        load_corpus(tmp_path, cache=tmp_path / "cache")


def test_a_home_that_is_nobodys_is_no_file():
    with pytest.raises(InputError, match=r"'~nobody-here/x\.txt' is neither a file"):
        load_corpus("~nobody-here/x.txt")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A packed text whose spool and tokens lie in the cache."""
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(bytes(range(250)) * 20))
    load_corpus(path, cache=tmp_path / "cache")
    return path


@pytest.mark.parametrize("name", ["manifest.json", "train.ids", "validation.documents", "text.bin", "sizes.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_a_damaged_cache_is_made_anew(kept, name, damage):
    (path,) = (kept.parent / "cache").rglob(name) if name != "manifest.json" else (kept.parent / "cache" / "tokens").rglob(name)
    whole = load_corpus(kept, cache=kept.parent / "cache")
    before = [np.array(whole.split(split)) for split in store.SPLITS]
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-8] if damage == "cut" else b"[]")
    again = load_corpus(kept, cache=kept.parent / "cache")
    assert again.digest == whole.digest
    for split, ids in zip(store.SPLITS, before, strict=True):
        assert np.array_equal(again.split(split), ids)
        assert np.array_equal(again.documents[split], whole.documents[split])


def test_a_cache_that_is_whole_is_only_read(kept, monkeypatch):
    """It may lie where nobody may write, not even a lock."""
    monkeypatch.setattr("unisono_tools.data.cache.locked", lambda path: pytest.fail(f"{path} is locked"))
    assert load_corpus(kept, cache=kept.parent / "cache").sizes["train"] == 4500


@pytest.mark.parametrize(
    "record",
    [
        "[]",
        "{}",
        '{"split": "train", "segment": 0, "bytes": 4000, "context": 0, "ids": 4000, "documents": 1, "before": {}}',
        '{"split": "test", "segment": 0, "bytes": 0, "context": 0, "ids": 0, "documents": 0, "before": {"train.ids": 4500}}',
    ],
)
def test_a_record_of_progress_that_is_damaged_is_no_progress(tmp_path: Path, kept, record):
    """The last ones say more than the files hold: one would be continued behind zeros, of the other a split would stay cut."""
    (place,) = (tmp_path / "cache" / "tokens").glob("*/")
    wanted = (place / "train.ids").read_bytes()
    (place / "manifest.json").unlink()
    (place / "train.ids").write_bytes(b"ab")
    (place / "progress.json").write_text(record)
    assert load_corpus(kept, cache=tmp_path / "cache").train.tobytes() == wanted
