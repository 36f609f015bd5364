"""unisono generate"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.sampling import Sampling

from unisono_tools.backends import open_reader
from unisono_tools.backends.base import Reader
from unisono_tools.commands.arguments import call
from unisono_tools.data import load_tokenizer
from unisono_tools.train.checkpoint import model_file, saved_tokenizer


def run(
    model: str,
    prompt: str = "The ",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: list[str] | None = None,
    backend: Literal["torch", "jax", "numpy", "onnx"] | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float64", "float32", "bfloat16"] = "float32",
    device: str | None = None,
) -> int:
    """Continue a prompt, printing the text as it comes. One seed gives one text on every backend, near-ties aside.

    Args:
        model: folder of a run or of a checkpoint, a .safetensors file, or a .onnx file with backend onnx.
        prompt: text to continue.
        max_new_tokens: how many tokens to add.
        temperature: 0 is greedy.
        top_k: draw among the k likeliest tokens only; 0 is all.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: of the draws.
        stop: texts that end the generation, and are not printed, as in '["\\n\\n"]'.
        backend: what computes; by default what is installed, and onnx for a .onnx file.
        tokenizer: its name, or the path of a tokenizer.json; the one that the model was trained with by default.
        dtype: compute dtype.
        device: cpu or cuda; the backend's own choice by default.
    """
    path = model_file(Path(model))
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: {max_new_tokens}; use a positive integer")
    sampling = Sampling(temperature, top_k, top_p, seed)
    reader = open_reader(path, backend, dtype, device)
    coder = load_tokenizer(tokenizer) if tokenizer else saved_tokenizer(path, reader.tokenizer)
    ids = coder.encode(prompt)
    decoder, ends, ties = coder.decoder(), Stops(stop or []), 0
    print(prompt, end="", flush=True)
    for token, tie in stream(reader, ids, max_new_tokens, sampling):
        ties += tie
        print(ends.feed(decoder.feed(token)), end="", flush=True)
        if ends.reached:
            break
    print("" if ends.reached else ends.feed(decoder.end()) + ends.rest())
    if ties:
        print(f"{ties} of {max_new_tokens} choices were near-ties, which another backend's rounding could turn", file=sys.stderr)
    return 0


class Stops:
    """Text as it comes, up to the first of some texts; what may be the beginning of one is held back."""

    def __init__(self, texts: list[str]) -> None:
        if "" in texts:
            raise InputError("stop: '' is in every text; give at least one character")
        self.texts, self.held, self.reached = texts, "", False

    def feed(self, text: str) -> str:
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


def stream(reader: Reader, prompt: np.ndarray, max_new_tokens: int, sampling: Sampling) -> Iterator[tuple[int, bool]]:
    """Token after token, and whether each was a near-tie. prompt: ids [T]."""
    if not len(prompt):
        raise InputError("prompt: empty; give at least one token")
    state, given = None, prompt[None]
    for number in range(max_new_tokens):
        found = reader.generate(given, 1, sampling, state, number)
        state, given = found.state, found.tokens
        yield int(found.tokens[0, 0]), bool(found.near_ties[0, 0])


def main(argv: list[str]) -> int:
    return call("generate", run, argv)
