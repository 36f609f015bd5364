"""Text as it comes: what `generate`, `run` and the demo have in common. Memory does not grow with prompt or text."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.aside import check_writable
from unisono_spec.contract.continuing import Continuation, load_continuation, save_continuation
from unisono_spec.contract.generation import MOST, PIECE, Generated
from unisono_spec.contract.plain import expanded
from unisono_spec.contract.sampling import Sampling

from unisono_tools.backends.base import Reader
from unisono_tools.data.tokenizers import Tokenizer
from unisono_tools.signals import Signals

PROMPT = "The "
SAMPLING = Sampling(temperature=0.8)
BLOCK = 1 << 16  # bytes of a prompt's file read at once


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command was asked for; None where a saved state or the default decides. prompt_file "-" is standard input."""

    prompt: str | None
    prompt_file: str | None
    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    repetition_penalty: float | None
    stop: list[str] | None
    state: str | None
    save_state: str | None

    def check(self) -> None:
        """Raise InputError for what needs no model to be seen wrong."""
        if not 1 <= self.max_new_tokens <= MOST:
            raise InputError(f"max_new_tokens: {self.max_new_tokens}; use an integer from 1 to {MOST}")
        if self.prompt is not None and self.prompt_file is not None:
            raise InputError("prompt_file: a prompt is given too; give one of them")
        self.sampling(SAMPLING)
        Stops(self.stop or [])

    def sampling(self, default: Sampling) -> Sampling:
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        given["repetition_penalty"] = self.repetition_penalty
        return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})


def write(reader: Reader, coder: Tokenizer, asked: Request) -> int:
    """Print the text that continues a prompt, or a saved state, as it comes; the exit code.

    A first signal ends the text after the token that is being made, and the state is saved all the same; a second Ctrl-C ends at once.
    """
    asked.check()
    kept = None if asked.save_state is None else expanded(asked.save_state)
    if kept is not None:
        check_writable(kept)  # or the text would be written, and where it stands lost
    before = load_continuation(expanded(asked.state), reader.config) if asked.state is not None else None
    sampling = asked.sampling(before.sampling if before and before.sampling else SAMPLING)
    prompt = PROMPT if before is None and asked.prompt is None and asked.prompt_file is None else asked.prompt or ""
    pieces = _pieces(coder, coder.encode(prompt), asked.prompt_file, before.unread if before else ())
    state, number = (reader.from_numpy(before.state), before.n_generated) if before else (None, 0)
    text = Text(coder, asked.stop or [], before.held if before else ())
    seen = None
    if before and before.seen is not None:
        seen = np.zeros((1, reader.config.vocab_size), bool)
        seen[0, list(before.seen)] = True
    found, gone, ties, count = None, False, 0, 0
    with Signals() as signals:
        try:
            print(prompt, end="", flush=True)
            for found in stream(reader, _until(pieces, signals), asked.max_new_tokens, sampling, state, number, seen):
                count += 1
                ties += int(found.near_ties[0, 0])
                print(text.put(int(found.tokens[0, 0])), end="", flush=True)
                if text.ended or signals.received is not None:
                    break
            # what the state goes on from may be half a character: it is not printed as a broken one
            print(text.rest(whole=kept is None))
        except BrokenPipeError:  # the reader of our output has gone, as `head` does
            gone = True
        if kept is not None and found is not None:
            unread = tuple(int(i) for i in found.tokens[0])
            marks = None if found.seen is None else tuple(np.flatnonzero(found.seen[0]).tolist())
            save_continuation(
                kept,
                reader.config,
                Continuation(reader.to_numpy(found.state), unread, found.n_generated, tuple(text.held), sampling, marks),
            )
            print(f"{asked.save_state}: the state after {found.n_generated} tokens; go on with --state", file=sys.stderr)
        if gone:
            raise BrokenPipeError
        if ties:
            print(f"{ties} of {count} choices were near-ties, which another backend's rounding could turn", file=sys.stderr)
    if signals.received is None:
        return 0
    if signals.received.name == "SIGINT":
        raise KeyboardInterrupt
    return 128 + signals.received  # as a shell reports a process that the signal ended


def stream(
    reader: Reader,
    prompt: Iterable[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    state: object = None,
    n_generated: int = 0,
    seen: np.ndarray | None = None,
) -> Iterator[Generated]:
    """Token after token. prompt: ids [T] in pieces, each but the last read as soon as the next has come."""
    given = None
    for piece in prompt:
        if given is not None:
            found = reader.generate(given, 0, sampling, state, n_generated, seen=seen)
            state, seen = found.state, found.seen
        given = piece[None]
    if given is None:
        raise InputError("prompt: empty; give at least one token")
    for _ in range(max_new_tokens):
        found = reader.generate(given, 1, sampling, state, n_generated, seen=seen)
        yield found
        state, given, n_generated, seen = found.state, found.tokens, found.n_generated, found.seen


def _until(pieces: Iterable[np.ndarray], signals: Signals) -> Iterator[np.ndarray]:
    """A long prompt is left between two pieces."""
    for piece in pieces:
        if signals.received is not None:
            raise KeyboardInterrupt
        yield piece


def _pieces(coder: Tokenizer, prompt: np.ndarray, file: str | None, unread: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Ids of all that is to be read first, at most PIECE at once."""
    pieces: Iterator[np.ndarray] = iter((prompt,))
    if file is not None:
        pieces = (encoded.ids for encoded in coder.encode_stream(_blocks(file), "prompt_file" if file == "-" else file))
    for ids in itertools.chain((np.array(unread, np.int64),), pieces):
        for start in range(0, len(ids), PIECE):
            yield ids[start : start + PIECE]


def _blocks(file: str) -> Iterator[bytes]:
    try:
        if file != "-" and expanded(file).is_char_device():
            raise ValueError("a device, which may never end")
        with contextlib.nullcontext(sys.stdin.buffer) if file == "-" else expanded(file).open("rb") as source:
            while block := source.read(BLOCK):
                yield block
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"prompt_file: {file} cannot be read ({reason}); give the path of a text, or - for standard input") from error


class Text:
    """Ids to printable text, up to the first of some stop texts. before: ids whose text was not whole when a saved text stopped."""

    def __init__(self, coder: Tokenizer, stop: list[str], before: tuple[int, ...] = ()) -> None:
        self.decoder, self.stops = coder.decoder(), Stops(stop)
        for token in before:
            self.decoder.put(token)  # what of them could be printed was

    def put(self, token: int) -> str:
        return self.stops.put(self.decoder.put(token))

    @property
    def ended(self) -> bool:
        return self.stops.reached

    @property
    def held(self) -> list[int]:
        return self.decoder.held

    def rest(self, whole: bool = True) -> str:
        """What was held back. whole: half a character too, as U+FFFD."""
        return (self.stops.put(self.decoder.end()) if whole and not self.ended else "") + self.stops.rest()


class Stops:
    """Text as it comes, up to the first of some texts; what may be the beginning of one is held back."""

    def __init__(self, texts: list[str]) -> None:
        if "" in texts:
            raise InputError("stop: '' is in every text; give at least one character")
        self.texts, self.held, self.reached = texts, "", False

    def put(self, text: str) -> str:
        if self.reached:
            return ""
        self.held += text
        found = [at for stop in self.texts if (at := self.held.find(stop)) >= 0]
        self.reached = bool(found)
        longest = max((n for stop in self.texts for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        cut = min(found) if found else len(self.held) - longest
        out, self.held = self.held[:cut], self.held[cut:]
        return out

    def rest(self) -> str:
        return "" if self.reached else self.held
