"""Ids to text as they come, without a character that is half there."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """Text as its ids come: what `put` and `end` return, joined, is what `decode` makes of all ids at once."""

    def put(self, token: int) -> str: ...

    def end(self) -> str: ...

    @property
    def held(self) -> list[int]:
        """The last ids, where their text is not whole yet: another decoder that is fed them goes on from here."""
        ...


class ByteDecoder:
    def __init__(self, spell: Callable[[int], bytes]) -> None:
        self.spell, self.utf8, self.held = spell, codecs.getincrementaldecoder("utf-8")("replace"), []

    def put(self, token: int) -> str:
        text = self.utf8.decode(self.spell(token))
        self.held = [*self.held, token] if self.utf8.getstate()[0] else []
        return text

    def end(self) -> str:
        return self.utf8.decode(b"", True)


class Immediate:
    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode, self.held = decode, []

    def put(self, token: int) -> str:
        return self.decode([token])

    def end(self) -> str:
        return ""


class Window:
    """For decoders that look at neighbours: the newest ids are decoded again, and what has become certain is handed on."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode, self.ids, self.said = decode, [], ""

    def put(self, token: int) -> str:
        self.ids.append(token)
        text = self.decode(self.ids)
        new = self._say(text.rstrip(REPLACEMENT))
        if len(self.ids) >= 64 and self.said == text:
            self._forget(text)
        return new

    def end(self) -> str:
        return self._say(self.decode(self.ids))

    @property
    def held(self) -> list[int]:
        return list(self.ids)

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
