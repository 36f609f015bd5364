"""unisono generate"""

from __future__ import annotations

import sys
from typing import Literal

from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.backends import open_reader
from unisono_tools.batched import write_many
from unisono_tools.commands.arguments import call
from unisono_tools.data import load_tokenizer
from unisono_tools.streaming import PROMPT, SAMPLING, Request, write
from unisono_tools.train.checkpoint import model_file, saved_tokenizer
from unisono_tools.verify import verify as check


def run(
    model: str,
    prompt: str | None = None,
    prompt_file: str | None = None,
    max_new_tokens: int = 200,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    repetition_penalty: float | None = None,
    stop: list[str] | None = None,
    prompts: str | None = None,
    batch_size: int = 16,
    verify: bool = False,
    state: str | None = None,
    save_state: str | None = None,
    backend: Literal["torch", "jax", "numpy", "onnx"] | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float64", "float32", "bfloat16"] = "float32",
    device: str | None = None,
) -> int:
    """Continue a prompt, printing the text as it comes. One seed gives one text on every backend, near-ties aside.

    Args:
        model: folder of a run or of a checkpoint, a .safetensors file, or a .onnx file with backend onnx.
        prompt: text to continue; 'The ' by default, nothing more where a saved state goes on.
        prompt_file: file that holds it instead, read in pieces; - is standard input. It is not printed.
        max_new_tokens: how many tokens to add.
        temperature: 0 is greedy; 0.8 by default, or what the state was saved with, as the next four.
        top_k: draw among the k likeliest tokens only; 0 is all.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: of the draws.
        repetition_penalty: divide the logits of ids that the text holds, above 0, and multiply those below; 1 is none.
        stop: texts that end the generation, and are not printed, as in '["\\n\\n"]'.
        prompts: file of many, one a line, or JSON lines with a field "prompt"; each gets a line of JSON with its text.
        batch_size: how many of them are continued at once.
        verify: read the text again in float64, and say by how much the logits err and which choices it turned.
        state: file of a saved state to go on from, as one longer text would have.
        save_state: file to save the state to, when the text ends or is interrupted.
        backend: what computes; by default what is installed, and onnx for a .onnx file.
        tokenizer: its name, or the path of a tokenizer.json; the one that the model was trained with by default.
        dtype: compute dtype.
        device: cpu or cuda; the backend's own choice by default.
    """
    asked = Request(prompt, prompt_file, max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty, stop, state, save_state)
    path = model_file(expanded(model))
    if prompts is None:
        asked.check()
    reader = open_reader(path, backend, dtype, device)
    coder = load_tokenizer(tokenizer) if tokenizer else saved_tokenizer(path, reader.tokenizer)
    if verify and (prompts or prompt_file or state or path.suffix == ".onnx"):
        raise InputError("verify: reads a prompt and weights; leave out prompts, prompt_file and state, and give a checkpoint")
    if prompts is not None:
        return write_many(reader, coder, asked, prompts, batch_size)
    code = write(reader, coder, asked)
    if verify and code == 0:
        wide = open_reader(path, backend, "float64", device)
        found = check(reader, wide, coder.encode(PROMPT if prompt is None else prompt), max_new_tokens, asked.sampling(SAMPLING))
        print(f"{dtype}: {found}", file=sys.stderr)
    return code


def main(argv: list[str]) -> int:
    return call("generate", run, argv)
