"""Tokenizers: no script is parted, pieces are tokenized as the whole, streamed text is the text, and what is made is made once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from unisono_spec.contract import InputError
from unisono_tools.data import SPLITS, load_corpus, load_tokenizer, store, tokenizers
from unisono_tools.data.sources import PIECE, open_source
from unisono_tools.data.tokenizers import Bytes, Chars, Tokenizer, restore

SCRIPTS = {
    "accents": "é" * 3001,
    "russian": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. " * 40,
    "chinese": "道可道非常道名可名非常名無名天地之始有名萬物之母故常無欲以觀其妙" * 90,
    "curly": "“I don’t,” she said — “it’s 12° below…” " * 80,
    "emoji": "👩‍🚀🚀😀 family: 👨‍👩‍👧‍👦! " * 80,
    "blank lines": "\n\n\n \n\n" * 500 + "text\n\n\n",
    "crlf": "line one\r\nline two, it's\r\n\r\n" * 100,
    "one line": "word " * 800,
    "no spaces": "".join(f"{i};" for i in range(900)),
}


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small tokenizers as their libraries write them: byte-level as GPT-2's, and one with ▁ for spaces as Llama's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder, texts = tmp_path_factory.mktemp("tokenizers"), list(SCRIPTS.values())
    level = Tokenizer(models.BPE())
    level.pre_tokenizer, level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    level.post_processor = processors.ByteLevel(trim_offsets=True)
    short = {"max_token_length": 8, "show_progress": False}
    level.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **short))
    level.enable_truncation(32)
    level.enable_padding(length=64)
    marked = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    marked.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    marked.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    marked.train_from_iterator(texts[3:4], trainers.BpeTrainer(vocab_size=500, special_tokens=special, **short))
    out = {}
    for name, model in (("byte level", level), ("marked", marked)):
        out[name] = folder / f"{name}.json"
        model.save(str(out[name]))
    return out


@pytest.mark.parametrize("script", SCRIPTS)
def test_pieces_are_tokenized_as_the_whole(subwords, script, monkeypatch):
    text = SCRIPTS[script]
    coder = load_tokenizer(str(subwords["byte level"]))
    whole = coder.encode(text)
    assert coder.decode(whole) == text
    monkeypatch.setattr(tokenizers, "CONTEXT", 64)
    monkeypatch.setattr(tokenizers, "PIECE", 300)
    data = text.encode()
    for size in (1, 97, 1 << 20):
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        found = list(coder.encode_stream(pieces, "text"))
        assert len(found) > 3
        assert found[-1].done == len(data)
        assert np.array_equal(np.concatenate([piece.ids for piece in found]), whole)
    # from any piece on, in another process
    for k, piece in enumerate(found[:-1]):
        rest = coder.encode_stream([data[piece.done - piece.context :]], "text", context=piece.context)
        assert np.array_equal(np.concatenate([p.ids for p in found[: k + 1]] + [p.ids for p in rest]), whole)


def test_a_tokenizer_that_drops_spaces_is_read_in_pieces_too(monkeypatch, tmp_path):
    """As BERT's does: a piece may hold no token at all."""
    model = {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    model["vocab"] = {"?": 0, "ἀρχή": 1, "##ν": 2}
    (tmp_path / "spaces.json").write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "BertPreTokenizer"}, "model": model}))
    coder, text = load_tokenizer(str(tmp_path / "spaces.json")), " \n" * 900 + "ἀρχήν ἀρχή" + "\t" * 700 + "λόγος"
    monkeypatch.setattr(tokenizers, "CONTEXT", 64)
    monkeypatch.setattr(tokenizers, "PIECE", 300)
    found = list(coder.encode_stream([text.encode()], "text"))
    assert len(found) > 3
    assert np.concatenate([piece.ids for piece in found]).tolist() == coder.encode(text).tolist() == [1, 2, 1, 0]


def test_a_tokenizer_that_marks_beginnings_is_read_in_pieces_too(subwords, monkeypatch):
    coder, text = load_tokenizer(str(subwords["marked"])), SCRIPTS["curly"]
    whole = coder.encode(text)
    monkeypatch.setattr(tokenizers, "CONTEXT", 64)
    monkeypatch.setattr(tokenizers, "PIECE", 300)
    assert np.array_equal(np.concatenate([p.ids for p in coder.encode_stream([text.encode()], "text")]), whole)
    assert coder.decode(whole) == text


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["bytes", "chars", "byte level"])
def test_splits_never_part_a_character(subwords, tmp_path, script, name):
    path = tmp_path / "text.txt"
    path.write_text(SCRIPTS[script], newline="")
    for limit in (None, *range(1001, 1006)):
        text = load_corpus(path, str(subwords.get(name, name)), limit, cache=tmp_path / "cache")
        assert text.tokenizer is not None
        parts = [text.tokenizer.decode(text.split(split)) for split in SPLITS]
        whole = "".join(parts)
        assert "\ufffd" not in whole
        assert SCRIPTS[script].startswith(whole)
        size = len(whole.encode())
        assert size == sum(text.sizes.values())
        assert size == len(SCRIPTS[script].encode()) if limit is None else limit - 4 < size <= limit
        assert [len(part.encode()) for part in parts] == [text.sizes[split] for split in SPLITS]


@pytest.mark.parametrize("name", ["chars", "byte level"])
@pytest.mark.parametrize("at", [10, 950, 999, PIECE + 7])
def test_the_byte_that_is_not_text_is_counted_in_the_file(subwords, tmp_path, name, at):
    path = tmp_path / "latin1.txt"
    path.write_bytes((b"ab " * at)[:at] + "ü".encode("latin-1") + b"b" * (5 if at == 999 else 40 if at == 950 else 30))
    with pytest.raises(InputError, match=rf"latin1\.txt: byte {at} is not UTF-8"):
        load_corpus(path, str(subwords.get(name, name)), cache=tmp_path / "cache")


def _streamed(coder: Tokenizer, ids) -> str:
    decoder = coder.decoder()
    return "".join([*(decoder.put(int(i)) for i in ids), decoder.end()])


@pytest.mark.parametrize("name", ["bytes", "chars", "byte level", "marked"])
def test_streamed_is_decoded_at_once(subwords, name):
    coder = Chars("".join(SCRIPTS.values())) if name == "chars" else load_tokenizer(str(subwords.get(name, name)))
    random_ids = np.random.default_rng(0)
    for text in ("café 😀!", "holds \ufffd itself\ufffd", *(script[:200] for script in SCRIPTS.values())):
        ids = coder.encode(text)
        assert _streamed(coder, ids) == coder.decode(ids)
    # of broken characters, one with ▁ and <0xAB> takes back what it said before
    for _ in range(0 if name == "marked" else 200):
        ids = random_ids.integers(0, coder.vocab_size, 90)
        assert _streamed(coder, ids) == coder.decode(ids)


def test_a_broken_byte_does_not_spoil_its_neighbours():
    assert _streamed(Bytes(), b"caf\xe9\xf0\x9f\x98\x80!") == "caf\ufffd😀!"
    assert _streamed(Bytes(), "a\ufffdb".encode()) == "a\ufffdb"


def test_characters_are_learned_and_restored(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab日ba" * 50)
    text = load_corpus(path, "chars", cache=tmp_path / "cache")
    coder = text.tokenizer
    assert coder is not None
    assert coder.vocab_size == 4
    assert coder.encode("ab日c").tolist() == [1, 2, 3, 0]
    again = restore("chars", coder.definition)
    assert again.encode("日").tolist() == [3]
    with pytest.raises(InputError, match="half a surrogate pair"):
        coder.encode("a\ud800")


def test_what_a_json_says_of_length_is_not_obeyed(subwords):
    # a tokenizer.json may say: cut to 32 ids, pad to 64
    coder = load_tokenizer(str(subwords["byte level"]))
    assert len(coder.encode("")) == 0
    assert coder.decode(coder.encode(SCRIPTS["russian"])) == SCRIPTS["russian"]
    assert restore("again", coder.definition).encode("её").tolist() == coder.encode("её").tolist()


KILLED = """
import os, signal, sys
from pathlib import Path
from unisono_tools.data import load_corpus, store, tokenizers
tokenizers.PIECE, tokenizers.CONTEXT, store.EVERY = 300, 64, 2000
record, left = store._Writer._record, [int(sys.argv[4])]
def deadly(self, values):
    record(self, values)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
store._Writer._record = deadly
load_corpus(sys.argv[1], sys.argv[2], cache=Path(sys.argv[3]))
"""


def test_tokenizing_goes_on_where_it_was_killed(subwords, tmp_path, monkeypatch):
    """With a tokenizer that marks beginnings: a piece that is read without what was before it has another first token."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(SCRIPTS.values()):
        (folder / f"{i}.txt").write_text(text, newline="")
    arguments = (str(folder), str(subwords["marked"]))
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments, str(tmp_path / "killed"), "3"], check=False)
        assert done.returncode == -signal.SIGKILL
    calls, encode = [], tokenizers.Subwords.encode_stream
    monkeypatch.setattr(tokenizers.Subwords, "encode_stream", lambda self, *args: calls.append(args[1]) or encode(self, *args))
    resumed = load_corpus(*arguments, cache=tmp_path / "killed")
    rest = len(calls)
    whole = load_corpus(*arguments, cache=tmp_path / "whole")
    assert 0 < rest < len(calls) - rest
    assert resumed.digest == whole.digest
    for split in SPLITS:
        assert np.array_equal(resumed.split(split), whole.split(split))
        assert np.array_equal(resumed.documents[split], whole.documents[split])
    made = len(calls)
    load_corpus(*arguments, cache=tmp_path / "whole")
    assert len(calls) == made


HUNGRY = """
import resource, sys
from pathlib import Path
from unisono_tools.data import load_corpus
import tokenizers, numpy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
text = load_corpus(sys.argv[1], sys.argv[2], cache=Path(sys.argv[3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, sum(text.sizes.values()))
"""


RUSSIAN, THAI = "\r\n\r\nВсе счастливые семьи похожи ", "ภาษาไทยไม่มีช่องว่างระหว่างคำ"


@pytest.mark.parametrize(("name", "megabytes", "words"), [("bytes", 192, RUSSIAN), ("byte level", 3, RUSSIAN), ("byte level", 2, THAI)])
def test_memory_does_not_grow_with_the_text(subwords, tmp_path, name, megabytes, words):
    path = tmp_path / "text.txt"
    line = words * 20
    with path.open("w", newline="") as file:
        for _ in range(megabytes * 2**20 // len(line.encode())):
            file.write(line)
    command = [sys.executable, "-c", HUNGRY, str(path), str(subwords.get(name, name)), str(tmp_path / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "0"})
    grown, size = map(float, done.stdout.split())
    assert size == path.stat().st_size
    # what the buffers of one piece take, whatever the file's size; 3 MB at once were 400
    assert grown < 160, grown


def test_json_lines_and_patterns_and_fasta(tmp_path):
    rows = [{"body": f"document {i}, it's\n"} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    text = load_corpus(tmp_path / "a.jsonl", field="body")
    assert len(np.concatenate([text.documents[split] for split in SPLITS])) == 60
    assert bytes(text.train[:14]) == b"document 0, it"
    with pytest.raises(InputError, match=r"a\.jsonl: line 1 has no field 'text'; Valid: body"):
        load_corpus(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(InputError, match=r"b\.jsonl: line 2: field 'text' holds int"):
        load_corpus(tmp_path / "b.jsonl")
    for i in range(3):
        (tmp_path / f"part{i}.txt").write_text(f"{i}" * 100)
    assert [int(n) for n in open_source(str(tmp_path / "part*.txt")).sizes] == [100] * 3
    with pytest.raises(InputError, match="no file matches"):
        load_corpus(tmp_path / "*.nothing")
    (tmp_path / "x.fasta").write_text(">one\nacgt\nAC\n>two\nGGG\n")
    source = open_source(str(tmp_path / "x.fasta"))
    assert [b"".join(source.read(i, 0, int(n))) for i, n in enumerate(source.sizes)] == [b"ACGTAC", b"GGG"]


def test_a_validation_file_of_its_own(tmp_path):
    for name, letter in (("train", "a"), ("validation", "b")):
        (tmp_path / f"{name}.txt").write_text(letter * 500)
    text = load_corpus(tmp_path / "train.txt", validation=str(tmp_path / "validation.txt"))
    assert (len(text.train), len(text.validation), len(text.test)) == (500, 500, 0)
    assert bytes(text.validation[:3]) == b"bbb"


def test_the_digest_names_the_text_and_the_tokenizer(tmp_path, subwords):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 100)
    first = load_corpus(path).digest
    assert load_corpus(path).digest == first
    assert load_corpus(path, str(subwords["byte level"])).digest != first
    path.write_text("abd " * 100)
    assert load_corpus(path).digest != first
    assert store.VERSION == 1


def test_random_bytes_are_cut_anywhere(tmp_path):
    path, source = tmp_path / "noise.bin", random.Random(0)
    path.write_bytes(source.randbytes(5000))
    text = load_corpus(path)
    assert b"".join(bytes(text.split(split)) for split in SPLITS) == path.read_bytes()
