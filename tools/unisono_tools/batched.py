"""Many prompts at once, of any lengths: what `unisono generate --prompts` does. Memory is that of one batch."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.errors import shown
from unisono_spec.contract.plain import MAX_BYTES, expanded, is_file, read_json
from unisono_spec.contract.sampling import Sampling

from unisono_tools.backends.base import Reader
from unisono_tools.data.tokenizers import Tokenizer
from unisono_tools.streaming import SAMPLING, Request, Text

AT_ONCE = 16  # ids between two looks at which texts have ended


def write_many(reader: Reader, coder: Tokenizer, asked: Request, file: str, batch_size: int) -> int:
    """Print one line of JSON for each prompt of `file`, in their order, batch by batch: prompt, text, tokens, near_ties; the exit code."""
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size}; use a positive number of prompts")
    if any(given is not None for given in (asked.prompt, asked.prompt_file, asked.state, asked.save_state)):
        raise InputError("prompts: goes with no other prompt and with no state; leave those out")
    asked.check()
    prompts, count = _prompts(file), 0
    while batch := list(itertools.islice(prompts, batch_size)):
        count += len(batch)
        for row in continued(reader, coder, batch, asked.max_new_tokens, asked.sampling(SAMPLING), asked.stop or []):
            print(json.dumps(row, ensure_ascii=False), flush=True)
    if not count:
        raise InputError(f"prompts: {file} holds none; write one a line")
    return 0


def continued(
    reader: Reader, coder: Tokenizer, prompts: list[str], max_new_tokens: int, sampling: Sampling, stop: list[str]
) -> list[dict[str, object]]:
    """What follows each prompt, all read together. Row i draws as row i of a batch does: alone, prompt 0 has the same text."""
    ids = [coder.encode(prompt) for prompt in prompts]
    if empty := [prompt for prompt, row in zip(prompts, ids, strict=True) if not len(row)]:
        raise InputError(f"prompts: {shown(empty[0])} is empty; give each at least one token")
    given = np.zeros((len(ids), max(map(len, ids))), np.int64)
    valid: np.ndarray | None = np.zeros(given.shape, bool)
    for row, mask, own in zip(given, valid, ids, strict=True):
        row[: len(own)], mask[: len(own)] = own, True
    texts, out, ties, tokens = [Text(coder, stop) for _ in ids], [""] * len(ids), [0] * len(ids), [0] * len(ids)
    state, number, seen = None, 0, None
    while number < max_new_tokens and not all(text.ended for text in texts):
        found = reader.generate(given, min(AT_ONCE, max_new_tokens - number), sampling, state, number, valid, seen)
        for i, text in enumerate(texts):
            for token, tie in zip(found.tokens[i].tolist(), found.near_ties[i].tolist(), strict=True):
                if not text.ended:
                    out[i] += text.put(token)
                    ties[i], tokens[i] = ties[i] + tie, tokens[i] + 1
        given, valid, state, number, seen = found.tokens[:, -1:], None, found.state, found.n_generated, found.seen
    rows = zip(prompts, out, texts, tokens, ties, strict=True)
    return [{"prompt": p, "text": o + t.rest(), "tokens": n, "near_ties": k} for p, o, t, n, k in rows]


def _prompts(file: str) -> Iterator[str]:
    """Each line of a text, or the field `prompt` of each line of a .jsonl file; empty lines are none."""
    path, fields = expanded(file), file.endswith((".jsonl", ".ndjson"))
    if not is_file(path):
        raise InputError(f"prompts: {shown(file)} is no file; give a text with one prompt a line, or JSON lines")
    try:
        with path.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_BYTES):
                number += 1
                if len(line) == MAX_BYTES:
                    raise InputError(f"prompts: {file}, line {number} is longer than {MAX_BYTES - 1} bytes; give it by --prompt_file")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # some editors begin a file with it
                if not line.strip():
                    continue
                try:
                    text = line.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise InputError(f"prompts: {file}, line {number} is not UTF-8 ({error.reason}); correct it") from error
                yield _prompt(text, f"{file}, line {number}") if fields else text
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"prompts: {file} cannot be read ({reason}); give a text with one prompt a line, or JSON lines") from error


def _prompt(line: str, where: str) -> str:
    row = read_json(line, where, "correct the line")
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise InputError(f'prompts: {where} has no text under \'prompt\'; write {{"prompt": "…"}}')
    return row["prompt"]
