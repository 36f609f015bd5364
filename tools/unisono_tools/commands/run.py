"""unisono run"""

from __future__ import annotations

from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.backends import open_reader
from unisono_tools.commands.arguments import call
from unisono_tools.data.tokenizers import load_tokenizer, tokenizer_beside
from unisono_tools.streaming import Request, write


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
    state: str | None = None,
    save_state: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Continue a text with an exported graph. Needs onnxruntime, NumPy and the model's tokenizer: pip install 'unisono[run]'.

    Args:
        model: a .onnx file that `unisono export` wrote.
        prompt: text to continue; 'The ' by default, nothing more where a saved state goes on.
        prompt_file: file that holds it instead, read in pieces; - is standard input. It is not printed.
        max_new_tokens: how many tokens to add.
        temperature: 0 is greedy; 0.8 by default, or what the state was saved with, as the next four.
        top_k: draw among the k likeliest tokens only; 0 is all.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: of the draws.
        repetition_penalty: divide the logits of ids that the text holds, above 0, and multiply those below; 1 is none.
        stop: texts that end the generation, and are not printed, as in '["\\n\\n"]'.
        state: file of a saved state to go on from, as one longer text would have.
        save_state: file to save the state to, when the text ends or is interrupted.
        tokenizer: its name, or the path of a tokenizer.json; what the graph names and what lies beside it by default.
    """
    asked, path = (
        Request(prompt, prompt_file, max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty, stop, state, save_state),
        expanded(model),
    )
    if path.suffix != ".onnx":
        raise InputError(f"model: {model!r} is not a .onnx file; write one with `unisono export`, or use `unisono generate`")
    asked.check()
    reader = open_reader(path, "onnx")
    return write(reader, load_tokenizer(tokenizer) if tokenizer else tokenizer_beside(path, reader.tokenizer or "bytes"), asked)


def main(argv: list[str]) -> int:
    return call("run", run, argv)
