"""InfinityFormer's time scales after training: `python -m unisono_tools.experiments.scales RUN --output docs/results/scales-infinityformer`

Of each layer the decays at the start and in the end, as the tokens after which half is forgotten, and the share of each reading for an
input of zero. And what each reads is for: the bits a token that are lost on the run's test split when all layers do without it. A memory
is silenced by its mixing weight, whose share the others take; the undecayed context by its gate.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import Arrays, InputError, init_params
from unisono_spec.contract.files import load_params
from unisono_spec.contract.infinityformer import InfinityFormerConfig

from unisono_tools.backends import backend
from unisono_tools.bench.report import about, ready
from unisono_tools.cli import guarded
from unisono_tools.config import TrainConfig, default_backend, from_dict
from unisono_tools.evaluation import evaluate
from unisono_tools.experiments import figures
from unisono_tools.reading import read_yaml
from unisono_tools.train.checkpoint import model_file
from unisono_tools.train.datamodule import load

SILENT = -100.0  # a logit whose share is below what a sum in float32 shows
TOKENS = 65536


def half_lives(config: InfinityFormerConfig, params: Arrays) -> list[list[float]]:
    """By layer and memory, the tokens after which half is forgotten: ln ½ / ln λ, for an input of zero."""
    return [[math.log(2) / math.log1p(math.exp(-a)) for a in _of(params, i, "decay.bias")] for i in range(config.n_layers)]


def shares(config: InfinityFormerConfig, params: Arrays) -> list[list[float]]:
    """By layer, what part of the reading is the context's and each memory's, for an input of zero."""
    out = []
    for i in range(config.n_layers):
        gate = float((1 / (1 + np.exp(-_of(params, i, "gate.bias")))).mean())
        mix = np.exp(_of(params, i, "mix") - _of(params, i, "mix").max())
        out.append([gate, *((1 - gate) * mix / mix.sum()).tolist()])
    return out


def without(config: InfinityFormerConfig, params: Arrays, reading: int) -> Arrays:
    """The weights with one reading silenced in all layers: 0 is the context, then the memories."""
    found = {name: array.copy() for name, array in params.items()}
    for i in range(config.n_layers):
        if reading:
            found[f"layers.{i}.mixer.mix"][reading - 1] = SILENT
        else:
            found[f"layers.{i}.mixer.gate.bias"][:] = SILENT
    return found


def _of(params: Arrays, layer: int, name: str) -> np.ndarray:
    return params[f"layers.{layer}.mixer.{name}"].astype(np.float64)


def measure(run: Path, device: str | None, tokens: int = TOKENS) -> dict[str, Any]:
    """Of the best checkpoint of a run on text."""
    file = model_file(run)
    config, params = load_params(file)
    if not isinstance(config, InfinityFormerConfig) or config.decay != "learned":
        raise InputError(f"{file}: holds {config.arch}; time scales are read of InfinityFormer with decay='learned'")
    train: TrainConfig = from_dict(read_yaml(run / "config.yaml"))
    ids = load(train.data).corpora[0].split("test")

    def bits(weights: Arrays) -> float:
        reader = backend(default_backend()).Reader(config, weights, "float32", device)
        return evaluate(reader, ids, tokens, train.seq_len).bits

    start, whole = init_params(config, train.seed), bits(params)
    return {
        "start": half_lives(config, start),
        "end": half_lives(config, params),
        "shares": shares(config, params),
        "bits": whole,
        "lost": [bits(without(config, params, reading)) - whole for reading in range(config.n_scales + 1)],
        "trained": f"{file.parent.name.replace('-', ' ')} of {train.steps:,}, each {train.batch_size} × {train.seq_len:,} tokens of "
        f"{train.data.corpus}",
    }


def markdown(content: dict[str, Any]) -> str:
    scales = len(content["end"][0])
    names = ["context", *(f"memory {s + 1}" for s in range(scales))]
    lines = ["# InfinityFormer's time scales after training", "", *(f"- {name}: {value}" for name, value in content["run"].items())]
    lines += [f"- trained: {content['trained']}; {content['bits']:.4f} bits a token of the test split", ""]
    lines += [
        "Tokens after which a memory has forgotten half, at the start → in the end, and its share of the reading, for an input of zero.",
        "",
    ]
    lines += [f"| layer | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for i, (before, after, share) in enumerate(zip(content["start"], content["end"], content["shares"], strict=True)):
        cells = [f"{share[0]:.1%}"]
        cells += [f"{b:,.1f} → {a:,.1f}, {part:.1%}" for b, a, part in zip(before, after, share[1:], strict=True)]
        lines.append(f"| {i} | {' | '.join(cells)} |")
    lines += ["", "Bits a token that are lost when all layers do without it:", ""]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|", f"| {' | '.join(f'{lost:+.4f}' for lost in content['lost'])} |"]
    return "\n".join(lines) + "\n"


def plot(path: Path, content: dict[str, Any]) -> None:
    """Left, half-lives by layer, hollow before training; right, what is lost without each reading."""
    with figures.panels(path, 2, 11, 4.2) as (left, right):
        for s, (before, after) in enumerate(zip(zip(*content["start"], strict=True), zip(*content["end"], strict=True), strict=True)):
            layers, colour = range(len(after)), f"C{s + 1}"
            left.plot(layers, before, "o--", color=colour, markerfacecolor="white", linewidth=0.8)
            left.plot(layers, after, "o-", color=colour, label=f"memory {s + 1}")
        left.set(yscale="log", xlabel="layer", ylabel="tokens", title="half is forgotten after (hollow: before training)")
        left.set_xticks(range(len(content["end"])))
        left.legend(loc="center left", bbox_to_anchor=(0, 0.42))
        names = ["context", *(f"memory {s + 1}" for s in range(len(content["lost"]) - 1))]
        bars = right.bar(names, content["lost"], color=[f"C{i}" for i in range(len(names))])
        right.bar_label(bars, [f"{lost:+.4f}" for lost in content["lost"]])
        right.set(ylabel="bits a token", title="lost when all layers do without it")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.experiments.scales", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, help="where to write, without extension: .json, .md and .png are added")
    parser.add_argument("--device", help="cpu or cuda")
    options = parser.parse_args(argv)
    ready(parser, options.output)
    device = options.device
    named = backend(default_backend()).device_name(device)
    content = {"run": about("python -m unisono_tools.experiments.scales RUN", named, "torch"), **measure(options.run, device)}
    print(markdown(content))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(content), encoding="utf-8")
        plot(options.output.with_suffix(".png"), content)
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded("scales", main))
