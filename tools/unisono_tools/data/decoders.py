"""Ids to text as they come, without a character that is half there."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """Text as its ids come: what `feed` and `end` return, joined, is what `decode` makes of all ids at once."""

    def feed(self, token: int) -> str: ...

    def end(self) -> str: ...


class ByteDecoder:
    def __init__(self, spell: Callable[[int], bytes]) -> None:
        self.spell, self.utf8 = spell, codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self.utf8.decode(self.spell(token))

    def end(self) -> str:
        return self.utf8.decode(b"", True)


class Immediate:
    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode

    def feed(self, token: int) -> str:
        return self.decode([token])

    def end(self) -> str:
        return ""


class Window:
    """For decoders that look at neighbours: the newest ids are decoded again, and what has become certain is handed on."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode, self.ids, self.said = decode, [], ""

    def feed(self, token: int) -> str:
        self.ids.append(token)
        text = self.decode(self.ids)
        new = self._say(text.rstrip(REPLACEMENT))
        if len(self.ids) >= 64 and self.said == text:
            self._forget(text)
        return new

    def end(self) -> str:
        return self._say(self.decode(self.ids))

    def _say(self, text: str) -> str:
        new, self.said = text[len(self.said) :], max(text, self.said, key=len)
        return new

    def _forget(self, text: str) -> None:
        """Drop the oldest ids, where what remains is decoded without them as with them."""
        for kept in range(16, 32):
            head, tail = self.decode(self.ids[:-kept]), self.decode(self.ids[-kept:])
            if head + tail == text and not head.endswith(REPLACEMENT) and not tail.startswith(REPLACEMENT):
                self.ids, self.said = self.ids[-kept:], tail
                return
