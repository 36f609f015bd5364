"""From text to ids and back: bytes, characters, GPT-2's byte-pair encoding, and any tokenizer of the `tokenizers` library."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.plain import expanded, read_file

from unisono_tools.data import registry
from unisono_tools.data.decoders import REPLACEMENT, ByteDecoder, Decoder, Immediate, Window

TOKENIZERS = ("bytes", "chars", "gpt2")
KNOWN = ("bytes", "gpt2")  # their name says all
DEFINITION = "tokenizer.json"  # beside a model, of every other one
PIECE = 1 << 16  # characters tokenized at once; of 1 << 18, what the library holds for a text without spaces grew with the text
MAX_DEFINITION = 1 << 27  # bytes of a tokenizer.json; those of 256,000 ids have some 20 MB
CONTEXT = 1 << 10  # characters before a piece that it is tokenized with


class Encoded(NamedTuple):
    """ids of one piece; done: bytes of the text behind it; context: how many of those the next piece must be read with."""

    ids: np.ndarray
    done: int
    context: int = 0


class Tokenizer(Protocol):
    name: str
    vocab_size: int

    @property
    def definition(self) -> str:
        """All that its ids depend on; `restore` makes the tokenizer of it."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Text → ids [N]."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids [N] → text; bytes that are not UTF-8 become U+FFFD."""
        ...

    def count_bytes(self, ids: np.ndarray) -> int:
        """How many bytes of text the ids [N] stand for."""
        ...

    def decoder(self) -> Decoder: ...

    def encode_stream(self, pieces: Iterable[bytes], source: str, offset: int = 0, context: int = 0) -> Iterator[Encoded]:
        """Bytes in pieces → ids in pieces: those of the whole, in memory that does not grow with it.

        context: so many of the first bytes were tokenized before. Raises InputError, naming `source` and the byte counted from
        `offset`, where the text is not UTF-8 though this tokenizer needs text.
        """
        ...


def load_tokenizer(name: str, cache: Path | None = None) -> Tokenizer:
    """ "bytes", "gpt2" (fetched once into `cache`), a `tokenizers` JSON file or a folder that holds one, or owner/name on the hub.

    "chars" learns its characters from a corpus: see `Chars.learn`.
    """
    if name == "bytes":
        return Bytes()
    if name == "gpt2":
        return _gpt2(cache)
    if name == "chars":
        raise InputError("tokenizer: 'chars' is learned from a corpus, and lies beside the model that was trained with it; leave it out")
    path = expanded(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.is_file():
        try:
            return restore(name, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError) as error:
            raise InputError(f"tokenizer: {path} cannot be read ({error}); give the tokenizer.json of a model") from error
    if name.count("/") == 1 and not name.endswith(".json"):
        return _from_hub(name)
    raise InputError(f"tokenizer: {name!r} is unknown; {nearest(name, TOKENIZERS)}, the path of a tokenizer.json, or owner/name")


def tokenizer_beside(model: Path, name: str) -> Tokenizer:
    """The tokenizer `name` of a model file: what lies beside the file says how it works, unless the name does."""
    definition = model.with_name(DEFINITION)
    if name in KNOWN:
        return load_tokenizer(name)
    if not definition.is_file():
        raise InputError(
            f"tokenizer: {model} was trained with {name!r}, and there is no {DEFINITION} beside it; "
            "move that with the model, or give another with --tokenizer"
        )
    return restore(name, read_file(definition, "give the tokenizer.json of the model", MAX_DEFINITION).decode(errors="replace"))


def restore(name: str, definition: str) -> Tokenizer:
    """The tokenizer that a `definition` describes."""
    try:
        values = json.loads(definition)
        if values.get("type") == "bytes":
            return Bytes()
        if values.get("type") == "chars":
            return Chars(values["characters"], name)
    except (ValueError, AttributeError, KeyError, RecursionError) as error:
        raise InputError(f"tokenizer: {name} is not a tokenizer's JSON ({error!r}); give a tokenizer.json") from error
    return Subwords(name, definition)


class Bytes:
    """UTF-8 bytes 0–255."""

    name, vocab_size, definition = "bytes", 256, '{"type": "bytes"}'

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).copy()  # frameworks want what can be written

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")

    def count_bytes(self, ids: np.ndarray) -> int:
        return len(ids)

    def decoder(self) -> Decoder:
        return ByteDecoder(lambda token: bytes([token]))

    def encode_stream(self, pieces: Iterable[bytes], source: str, offset: int = 0, context: int = 0) -> Iterator[Encoded]:
        done = 0
        for piece in pieces:
            done += len(piece)
            yield Encoded(np.frombuffer(piece, np.uint8).copy(), done)


class Chars:
    """Unicode characters, those of `characters` in order of their code points; id 0 stands for every other one."""

    def __init__(self, characters: str, name: str = "chars") -> None:
        self.name, self.characters = name, "".join(sorted(set(characters)))
        self.points = _points(self.characters)
        self.vocab_size = len(self.characters) + 1

    @classmethod
    def learn(cls, texts: Iterable[tuple[Iterable[bytes], str, int]]) -> Chars:
        """The characters of (bytes in pieces, source, offset), read once."""
        seen = np.zeros(0x110000, bool)
        for pieces, source, offset in texts:
            for text, _ in _texts(pieces, source, offset):
                seen[_points(text)] = True
        return cls(np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le"))

    @property
    def definition(self) -> str:
        return json.dumps({"type": "chars", "characters": self.characters})

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        points = _points(text)
        at = np.minimum(np.searchsorted(self.points, points), max(0, len(self.points) - 1))
        return np.where(self.points[at] == points, at + 1, 0).astype(np.int32) if len(self.points) else np.zeros(len(points), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(self.characters[i - 1] if 0 < i <= len(self.characters) else REPLACEMENT for i in np.asarray(ids).tolist())

    def count_bytes(self, ids: np.ndarray) -> int:
        return len(self.decode(ids).encode())

    def decoder(self) -> Decoder:
        return Immediate(self.decode)

    def encode_stream(self, pieces: Iterable[bytes], source: str, offset: int = 0, context: int = 0) -> Iterator[Encoded]:
        for text, done in _texts(pieces, source, offset):
            yield Encoded(self.encode(text), done)


class Subwords:
    """A tokenizer of the `tokenizers` library, from its JSON. Nothing is added to a text, cut off from it, or padded."""

    def __init__(self, name: str, definition: str) -> None:
        tokenizers = _library(name)
        self.name, self.definition = name, definition
        try:
            values = json.loads(definition)
            # what a post-processor does beside special tokens is to trim offsets, which `encode_stream` needs whole
            plain = {**values, "post_processor": None, "truncation": None, "padding": None}
            self.model: Any = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises plain Exceptions
            raise InputError(f"tokenizer: {name} is not a tokenizer that `tokenizers` reads ({error}); give a tokenizer.json") from error
        self.vocab_size = max(self.model.get_vocab().values(), default=-1) + 1
        self.bytes = self._byte_table() if (values.get("decoder") or {}).get("type") == "ByteLevel" else None

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        return np.array(self.model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        tokens = [int(i) for i in ids]
        if self.bytes is not None:
            return b"".join(self.bytes.get(i, b"") for i in tokens).decode(errors="replace")
        return self.model.decode(tokens, skip_special_tokens=False)

    def count_bytes(self, ids: np.ndarray) -> int:
        if self.bytes is None:
            return len(self.decode(ids).encode())
        return sum(len(self.bytes.get(i, b"")) * int(n) for i, n in enumerate(np.bincount(ids, minlength=1)) if n)

    def decoder(self) -> Decoder:
        table = self.bytes
        return Window(self.decode) if table is None else ByteDecoder(lambda token: table.get(token, b""))

    def _byte_table(self) -> dict[int, bytes]:
        """What each id stands for. A byte-level vocabulary writes the bytes that print as themselves, the others from U+0100 on."""
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        alphabet = {chr(b): b for b in plain}
        alphabet |= {chr(0x100 + i): b for i, b in enumerate(b for b in range(256) if b not in plain)}
        added = {i: token.content for i, token in self.model.get_added_tokens_decoder().items()}
        out = {}
        for token, i in self.model.get_vocab().items():
            spelt = i not in added and all(letter in alphabet for letter in token)
            out[i] = bytes(alphabet[letter] for letter in token) if spelt else token.encode()
        return out

    def encode_stream(self, pieces: Iterable[bytes], source: str, offset: int = 0, context: int = 0) -> Iterator[Encoded]:
        before, after, done = "", "", context
        for text, _ in _texts(pieces, source, offset):
            after += text
            if context and len(data := after.encode()) >= context:
                before, after, context = data[:context].decode(), data[context:].decode(), 0
            while not context and len(after) >= PIECE + CONTEXT:
                ids, number, kept = self._piece(before, after[: PIECE + CONTEXT])
                done += len(after[:number].encode())
                before, after = (before + after[:number])[-kept:] if kept else "", after[number:]
                yield Encoded(ids, done, len(before.encode()))
        if after:
            ids, _, _ = self._piece(before, after, last=True)
            yield Encoded(ids, done + len(after.encode()))

    def _piece(self, before: str, after: str, last: bool = False) -> tuple[np.ndarray, int, int]:
        """Ids of the first characters of `after`, how many those are, and how many characters the next piece must see before it.

        The cut lies where the library itself parts two tokens, if possible in front of a space; what lies before it is what the next
        piece sees, from such a place on too, so that both readings meet there.
        """
        text, n = before + after, len(before)
        encoding = self.model.encode(text, add_special_tokens=False)
        ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # the first tokens of all that begin where the one before has ended; a character in several tokens is not parted
        ends = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1]
        whole = np.flatnonzero(np.concatenate([[True], ends[:-1] <= offsets[1:, 0]])) if len(ids) else np.zeros(0, np.int64)
        places = offsets[whole, 0]
        begin = np.searchsorted(places, n)
        if n and (begin == len(places) or (ends[whole[begin] - 1] > n if whole[begin] else False)):
            return self._piece("", after, last)  # no token ends where the piece begins
        first = int(whole[begin]) if len(whole) else 0
        if last:
            return ids[first:], len(after), 0
        spaced = np.array([text[p].isspace() and not text[p - 1].isspace() if p else False for p in places.tolist()], bool)
        best = _last(places, spaced, n + PIECE // 2, n + PIECE)
        best = _last(places, np.ones(len(places), bool), n + 1, n + PIECE) if best is None else best
        if best is None:
            return ids[first:], len(after), 0
        cut = int(places[best])
        near = np.flatnonzero((places >= cut - CONTEXT) & (places < cut))
        good = near[spaced[near]] if spaced[near].any() else near
        return ids[first : whole[best]], cut - n, cut - int(places[good[0]]) if len(good) else 0


def _last(places: np.ndarray, allowed: np.ndarray, low: int, high: int) -> int | None:
    found = np.flatnonzero(allowed & (places >= low) & (places <= high))
    return int(found[-1]) if len(found) else None


def _texts(pieces: Iterable[bytes], source: str, offset: int) -> Iterator[tuple[str, int]]:
    """Strings, and how many bytes lie before the end of each. A character is never parted."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    for piece in _with_end(pieces):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source}: byte {offset + done - held + error.start} is not UTF-8, and this tokenizer needs text; convert the file or "
                "use tokenizer=bytes"
            ) from error
        done += len(piece)
        if text:
            yield text, done - len(decoder.getstate()[0])


def _with_end(pieces: Iterable[bytes]) -> Iterator[bytes]:
    yield from (piece for piece in pieces if piece)
    yield b""


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: character {error.start} is half a surrogate pair, which is no text; remove it, or set PYTHONUTF8=1 if it is UTF-8"
        ) from error


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _library(name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(f"tokenizer: {name!r} needs the package tokenizers; pip install tokenizers, or use tokenizer=bytes") from error
    return tokenizers


def _gpt2(cache: Path | None) -> Subwords:
    """GPT-2's byte-level BPE, 50,257 ids (Radford et al. 2019)."""
    tokenizers = _library("gpt2")
    vocab, merges = registry.fetch("gpt2-bpe", cache)
    model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return Subwords("gpt2", model.to_str())


def _from_hub(name: str) -> Subwords:
    try:
        model = _library(name).Tokenizer.from_pretrained(name)
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"tokenizer: {name!r} could not be read from the hub ({reason}); give the path of its tokenizer.json") from error
    return Subwords(name, model.to_str())


def identity(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.definition.encode()).hexdigest()
