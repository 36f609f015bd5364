"""The model of web/playground: trained unless one is given, exported, and described for the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from unisono_spec.contract import ANY, InputError, config_to_dict, count_params
from unisono_spec.contract.files import load_params, write_bytes

from unisono_tools.backends import open_reader
from unisono_tools.cli import guarded
from unisono_tools.commands.arguments import call, read_config
from unisono_tools.commands.export import run as export
from unisono_tools.config import from_dict
from unisono_tools.data import load_corpus
from unisono_tools.evaluation import evaluate
from unisono_tools.signals import obey
from unisono_tools.train import train
from unisono_tools.train.checkpoint import model_file, tokenizer_of

FORMAT = 1  # of model.json
ABOUT = "A language model of {parameters:,} parameters that writes as long as you let it: its state is {state:,} bytes, always."


def run(checkpoint: str | None = None, out: str = "web/playground/model", corpus: str = "sotu", steps: int = 0, tokens: int = 16384) -> int:
    """Train a small Mamba on the State of the Union, or take another model of bytes, and write model.onnx and model.json for the page.

    Args:
        checkpoint: a run, a checkpoint or a .safetensors file; none trains the config named playground.
        out: folder to write.
        corpus: what to train on, and whose held-out part says how good the model is.
        steps: train for exactly so many steps instead of the config's.
        tokens: how many held-out tokens to measure; 0 measures none.
    """
    folder = Path(out)
    path = model_file(Path(checkpoint)) if checkpoint else _trained(folder / "run", corpus, steps)
    config, _ = load_params(path)
    tokenizer = tokenizer_of(path) or "bytes"
    if tokenizer != "bytes" or config.reads_frames or config.vocab_size != 256:  # pyright: ignore[reportAttributeAccessIssue]
        raise InputError(f"checkpoint: {path} reads {tokenizer}, and the page reads bytes; train with --data.tokenizer bytes")
    if any(ANY in s.shape for s in config.states().values()):
        raise InputError(f"checkpoint: the state of {path} grows with the text; take a model without softmax attention")
    export(str(path), str(folder / "model.onnx"))
    state = sum(zeros.nbytes for zeros in open_reader(folder / "model.onnx", "onnx").init_state(1).values())
    about = {
        "format": FORMAT,
        "name": f"{config.arch}, {count_params(config):,} parameters",
        "about": ABOUT.format(parameters=count_params(config), state=state),
        "trained": _measured(path, corpus, tokens),
        "tokenizer": tokenizer,
        "vocabulary": 256,
        "config": json.dumps(config_to_dict(config)),
    }
    write_bytes(folder / "model.json", json.dumps(about, indent=1).encode())
    print(f"{folder / 'model.json'}: {about['name']}; {about['trained']}")
    return 0


def _trained(run: Path, corpus: str, steps: int) -> Path:
    values = read_config("playground")
    values["data"] |= {"corpus": corpus}
    plan = from_dict({**values, "out": str(run), **({"steps": steps} if steps else {})})
    result = train(plan)
    obey(result.signal)
    return model_file(result.checkpoint)


def _measured(path: Path, corpus: str, tokens: int) -> str:
    if not tokens:
        return "not measured"
    text = load_corpus(corpus)
    bits = evaluate(open_reader(path), text.validation[:tokens]).bits
    return f"{bits:.2f} bits a byte of held-out text ({text.name})"


def main(argv: list[str] | None = None) -> int:
    return guarded("playground", lambda: call("playground", run, sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
