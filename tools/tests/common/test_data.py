"""Corpora, splits, tokenizers and minibatches."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from unisono_spec.contract import InputError, preset
from unisono_tools.backends.base import dropout_seeds, router_noise
from unisono_tools.config import DataChoice
from unisono_tools.data import SPLITS, corpus, load_corpus, load_tokenizer, sources, stored
from unisono_tools.data.batches import batch, positions, reset_mask, shuffled_starts, starts
from unisono_tools.data.mixture import BLOCK, Mixture
from unisono_tools.train.loader import loader, steps_of


def test_sotu_is_split_by_speech_with_the_newest_held_out():
    text = load_corpus("sotu")
    everything = np.concatenate([text.split(name) for name in SPLITS])
    assert len(everything) > 12_000_000
    assert text.tokenizer is not None
    assert text.tokenizer.decode(text.train[:28]) == "Fellow-Citizens of the Senat"
    assert b"Obama" not in text.train[:].tobytes()
    assert b"COVID" in text.test.tobytes()
    for name in SPLITS:
        documents = text.documents[name]
        assert documents[0] == 0
        assert (np.diff(documents) > 0).all()
        assert text.reset(name).sum() == len(documents)
        assert text.bytes_per_token(name) == 1
    assert sum(len(d) for d in text.documents.values()) == 249


@pytest.mark.parametrize("sizes", [[100], [100] * 3, [1] * 100, [5, 90, 3, 2], [1000, 1, 1], [50, 50]])
def test_splits_cover_everything_in_order(sizes):
    parts = corpus._cut(sizes)
    assert sum(parts) == sum(sizes)
    assert all(part >= 0 for part in parts)
    assert parts[0] >= parts[1]


def test_a_folder_is_split_between_its_files(tmp_path: Path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([65 + i]) * 10)
    (tmp_path / ".hidden").write_bytes(b"no")
    (tmp_path / "empty.txt").write_bytes(b"")
    text = load_corpus(tmp_path)
    assert [len(text.split(name)) for name in SPLITS] == [180, 10, 10]
    assert list(text.documents["train"]) == list(range(0, 180, 10))
    assert bytes(text.test) == b"T" * 10


def test_a_corpus_is_mapped_and_limited(tmp_path: Path):
    path = tmp_path / "bytes.bin"
    path.write_bytes(bytes(range(256)) * 10)
    text = load_corpus(path)
    assert isinstance(text.train, np.memmap)
    assert [len(text.split(name)) for name in SPLITS] == [2304, 128, 128]
    assert len(load_corpus(path, limit=1000).train) == 900
    # what is mapped is our own copy: nobody shortens it
    os.truncate(path, 1000)
    assert np.array_equal(text.train, np.tile(np.arange(256, dtype=np.uint8), 9))


@pytest.mark.parametrize("share", [8, 1 << 60])
def test_an_array_is_read_or_left_where_it_is(tmp_path: Path, monkeypatch, share):
    """Whether it is small beside the memory or not, it is the same; and where its file shrinks meanwhile, that is an error, no signal."""
    monkeypatch.setattr(stored, "SHARE", share)
    path, whole = tmp_path / "ids.npy", np.tile(np.arange(256, dtype=np.uint8), 10)
    np.save(path, whole)
    array = stored.read_npy(path, "save it again")
    assert isinstance(array, np.ndarray) == (share == 8)
    at = np.array([[5, 6, 7], [250, 251, 252], [3, 3, -1]])
    for index in (slice(7, 100), slice(-5, None), slice(0, 50, 3), at, 12, (slice(2, 9),)):
        assert np.array_equal(np.asarray(array[index]), whole[index])
    assert np.array_equal(batch(array, 0, 0, 3, 8), batch(whole, 0, 0, 3, 8))
    with pytest.raises(IndexError):
        array[np.array([2560])]
    os.truncate(path, 1000)
    if share == 8:
        assert np.array_equal(array, whole)
    else:
        with pytest.raises(InputError, match="changed while it was read"):
            batch(array, 0, 0, 3, 8)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("short.txt", b"abc", "too few"),
        ("missing.txt", None, "neither a file nor a folder"),
        ("frames.npy", b"not an array", "not a .npy file"),
    ],
)
def test_useless_input_is_refused(tmp_path: Path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_corpus(tmp_path / name)


def test_frames_are_split_in_time_and_checked(tmp_path: Path):
    path = tmp_path / "frames.npy"
    frames = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    np.save(path, frames)
    video = load_corpus(path)
    assert video.tokenizer is None
    assert np.array_equal(np.concatenate([video.train, video.validation, video.test]), frames)
    assert batch(video.train, 0, 0, 3, 5).shape == (3, 6, 6)
    with pytest.raises(InputError, match="no bytes"):
        video.bytes_per_token()
    np.save(path, np.where(frames > 0.99, np.nan, frames))
    with pytest.raises(InputError, match="NaN"):
        load_corpus(path)
    np.save(path, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="objects"):
        load_corpus(path)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(InputError, match="did you mean 'sotu'"):
        load_corpus("sotuu")
    with pytest.raises(InputError, match="did you mean 'bytes'"):
        load_tokenizer("byte")
    with pytest.raises(InputError, match="limit"):
        load_corpus("c4")


def test_bytes_come_back_and_damaged_ones_are_replaced():
    coder = load_tokenizer("bytes")
    text = "Grüße, 世界"
    assert coder.decode(coder.encode(text)) == text
    assert coder.decode(coder.encode(text)[:3]) == "Gr\ufffd"


def test_batches_are_a_function_of_seed_and_step():
    ids = np.arange(1000, dtype=np.uint16)
    first = batch(ids, 3, 7, 4, 16)
    assert first.dtype == np.int64
    assert np.array_equal(first, batch(ids, 3, 7, 4, 16))
    assert np.array_equal(np.diff(first), np.ones((4, 16)))
    assert not np.array_equal(first, batch(ids, 3, 8, 4, 16))
    assert not np.array_equal(first, batch(ids, 4, 7, 4, 16))
    # of a later release, other numbers would be another run
    assert hashlib.sha256(positions(1000, 0, 0, 8).tobytes()).hexdigest()[:12] == "e964fb594a80"


def test_every_start_is_drawn():
    drawn = np.concatenate([starts(12, 0, step, 20, 9) for step in range(20)])
    assert set(drawn) == {0, 1, 2}
    assert starts(10, 0, 0, 3, 9).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="seq_len: 9"):
        starts(9, 0, 0, 3, 9)


def test_reset_mask_marks_document_starts():
    documents = np.array([0, 4, 5, 11])
    at = np.array([0, 3, 6])
    mask = reset_mask(documents, at, 6)
    expected = np.isin(at[:, None] + np.arange(6), documents)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(("length", "batch_size"), [(101, 3), (1000, 16), (11, 5)])
def test_an_epoch_reads_every_window_once(length, batch_size):
    windows = (length - 1) // 10
    steps = -(-2 * windows // batch_size)
    drawn = np.concatenate([shuffled_starts(length, 7, step, batch_size, 10) for step in range(steps)])
    for epoch in range(2):
        read = np.sort(drawn[epoch * windows : (epoch + 1) * windows])
        assert np.array_equal(np.diff(read), np.full(windows - 1, 10))
        assert 0 <= read[0] <= (length - 1) % 10
        assert read[-1] + 11 <= length
    if windows > 10:
        assert not np.array_equal(drawn[:windows] // 10, drawn[windows : 2 * windows] // 10)
    # from any step on, in another process
    assert np.array_equal(shuffled_starts(length, 7, steps - 1, batch_size, 10), drawn[(steps - 1) * batch_size :])


def test_noise_and_masks_are_drawn_by_seed_step_part_and_layer():
    config = preset("maru-1m", n_layers=2, router="gumbel", dropout=0.25)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    noise = {a.tobytes() for key in keys for a in router_noise(config, *key, (1, 2)) or ()}
    seeds = {int(seed) for key in keys for seed in dropout_seeds(config, *key)}
    assert len(noise) == len(keys) * len(config.noise_widths) == 8
    assert len(seeds) == len(keys) * config.n_updates


def test_epochs_begin_anywhere_in_what_their_windows_leave_over():
    """So that no id is left out for good, and none is always the first of a window."""
    assert {int(shuffled_starts(19, 7, epoch, 1, 10)[0]) for epoch in range(100)} == set(range(9))


def test_epochs_are_steps_and_documents_reset(tiny, tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 20)
    data = DataChoice(corpus=str(tmp_path), documents="reset", order="shuffled")
    train = tiny(data=data, epochs=1.5, batch_size=4, seq_len=16)
    text = load_corpus(tmp_path)
    assert len(text.train) == 36 * 40
    assert steps_of(train, text) == math.ceil(1.5 * (1439 // 16) / 4)
    batch = loader(train, train.validate(), text)(3)
    at = shuffled_starts(1440, train.seed, 3, 4, 16)
    assert batch.reset is not None
    assert np.array_equal(batch.reset, (at[:, None] + np.arange(16)) % 40 == 0)
    assert np.array_equal(batch.inputs, text.train[at[:, None] + np.arange(16)])
    assert loader(dataclasses.replace(train, data=dataclasses.replace(data, documents="joined")), train.validate(), text)(3).reset is None


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f4', (", "(" * 5000, "{" * 200, "1", "\0", "{'descr': 'O', 'fortran_order': False, 'shape': (3, 2), }", "lambda: 0"],
)
def test_headers_of_frames_that_numpy_cannot_read(tmp_path: Path, header):
    path = tmp_path / "frames.npy"
    text = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24))
    with pytest.raises(InputError, match=r"frames\.npy"):
        load_corpus(path)


def test_packed_files_and_records_are_read_in_pieces(tmp_path: Path, monkeypatch):
    """However short the pieces, and wherever they end: inside a header, a line, its break, a character."""
    text = "né 😀 ".encode() * 400
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text))
    records = b"".join(b">record %d, which has a long name\r\n" % i + b"acgtACGTN" * i + b"\r\nTTT\r\n;note\n" for i in range(1, 41))
    (tmp_path / "genome.fa").write_bytes(records)
    wanted = [b"ACGTACGTN" * i + b"TTT" for i in range(1, 41)]
    for piece in (1, 2, 7, 1 << 20):
        monkeypatch.setattr(sources, "PIECE", piece)
        packed, genome = (load_corpus(tmp_path / name, cache=tmp_path / f"cache{piece}") for name in ("text.txt.gz", "genome.fa"))
        assert b"".join(bytes(packed.split(name)) for name in SPLITS) == text
        found = [bytes(part) for name in SPLITS for part in np.split(genome.split(name), genome.documents[name][1:])]
        assert b"".join(found) == b"".join(wanted)
        assert found[:30] == wanted[:30]
        assert (packed.unit, genome.unit) == ("byte", "base")


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_no_folder(name):
    with pytest.raises(InputError, match="names nothing"):
        load_corpus(name)


@pytest.mark.parametrize("first", [1, 5, BLOCK - 1, BLOCK, BLOCK + 3])
def test_a_mixture_counts_what_it_drew(first):
    corpora: Any = tuple(SimpleNamespace(name=name, tokenizer=None, train=np.zeros((9, 2))) for name in "ab")
    mixture = Mixture(corpora, (1.0, 3.0))
    assert mixture.before(7, first).tolist() == np.bincount(mixture.drawn(7, 0, first), minlength=2).tolist()


@pytest.mark.parametrize(("number", "expected"), [(7, [4, 2, 1]), (9, [4, 3, 2]), (10, [5, 3, 2])])
def test_streams_go_to_the_largest_remainders(number, expected):
    corpora: Any = tuple(SimpleNamespace(name=name, tokenizer=None, train=np.zeros((9, 2))) for name in "abc")
    assert Mixture(corpora, (5.0, 3.0, 2.0)).lanes(number).tolist() == expected
