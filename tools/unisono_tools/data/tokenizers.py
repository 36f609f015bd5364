"""From text to ids and back: bytes, and GPT-2's byte-pair encoding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from unisono_spec.contract import InputError, nearest

from unisono_tools.data import registry

TOKENIZERS = ("bytes", "gpt2")
PIECE = 1 << 20  # bytes tokenized at once


class Tokenizer(Protocol):
    name: str
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """Text → ids [N]."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids [N] → text; bytes that are not UTF-8 become U+FFFD."""
        ...

    def encode_bytes(self, data: np.ndarray, source: str) -> np.ndarray:
        """Raw bytes [N] uint8 → ids. InputError, naming `source`, where they are not text though this tokenizer needs text."""
        ...


def load_tokenizer(name: str, cache: Path | None = None) -> Tokenizer:
    """ "bytes" or "gpt2" (fetched once into `cache`, the user's cache folder by default)."""
    if name not in TOKENIZERS:
        raise InputError(f"tokenizer: {name!r} is unknown; {nearest(name, TOKENIZERS)}")
    return Bytes() if name == "bytes" else GPT2(cache)


class Bytes:
    """UTF-8 bytes 0–255."""

    name, vocab_size = "bytes", 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")

    def encode_bytes(self, data: np.ndarray, source: str) -> np.ndarray:
        return data


class GPT2:
    """GPT-2's byte-level BPE, 50,257 ids (Radford et al. 2019), by the `tokenizers` library."""

    name, vocab_size = "gpt2", 50257

    def __init__(self, cache: Path | None = None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise InputError("tokenizer: 'gpt2' needs the package tokenizers; pip install tokenizers, or use tokenizer=bytes") from error
        vocab, merges = registry.fetch("gpt2-bpe", cache)
        pre: Any = tokenizers.pre_tokenizers
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
        self.bpe.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        self.bpe.decoder = tokenizers.decoders.ByteLevel()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.bpe.encode(text).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_bytes(self, data: np.ndarray, source: str) -> np.ndarray:
        parts = [self.encode(text) for text in _texts(data, source)]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _texts(data: np.ndarray, source: str) -> list[str]:
    """`data` as strings of about PIECE bytes, cut where GPT-2's pattern always cuts: after a line break between two visible characters."""
    out, start = [], 0
    raw = data.tobytes()
    while start < len(raw):
        match = re.compile(rb"[!-~]\n(?=[!-~])").search(raw, start + PIECE)
        end = match.end() if match else len(raw)
        try:
            out.append(raw[start:end].decode())
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source}: byte {start + error.start} is not UTF-8, and this tokenizer needs text; convert the file or use tokenizer=bytes"
            ) from error
        start = end
    return out
