"""Bad inputs to the command, drawn at random: arguments of every verb, and damage to every file that it reads.

    python tools/tests/badinput/run.py [--number 1700] [--seed 0]

Each runs in a process of its own with limits on time and memory. It must end with exit code 0, or with 2 and one line of error; a
traceback, a signal, a hang or more memory than that is a failure, which is printed with the command that gives it again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from unisono_spec.contract import init_params, preset
from unisono_tools import cli
from unisono_tools.commands.arguments import of_class, of_function
from unisono_tools.config import TrainConfig

SECONDS, MEMORY = 60, 12 << 30  # of one input; frameworks reserve address space that they never touch
VERBS = ("evaluate", "generate", "run", "precompute", "export", "match", "compare", "inspect", "importing")
NAMES = {"evaluate": "eval", "importing": "import"}
TEXTS = (
    *("", " ", "-1", "0", "1", "-0", "1e400", "-1e400", "nan", "inf", "-inf", "1.5", "0x10", "1_0", "1__0", "١٢", "²", "true", "null", "~"),
    *("None", "[]", "{}", "[1", "{a: 1}", "{a: {b: 1}}", "[a, b]", "a: b: c", "&a [*a]", "*a", "!!python/name:os.system", "!!int 3"),
    *("{class_path: os.X}", "{decay: {class_path: os.X}}", "{n_layers: 1000000000}", "{d_model: -1}", "{vocab_size: 1e9}", "{'': 1}"),
    *("{1: 2}", "\0", "\udcff", "\ud800", "é", "\u202e", "\n", "x" * 300, "x" * 5000, "9" * 400, "9" * 5000, str(2**31), str(2**63)),
    *(str(2**64), "[" * 5000, "/", "/dev/null", "/dev/zero", "/proc/self/mem", "..", "~", "file:///etc/passwd", "a/b/c", "x.npy", "x.onnx"),
    *("x.safetensors", "cpu", "gpu", "tpu", "meta", "cuda:99", "cpu:-1", "jax", "torch", "numpy", "onnx", "gpt2", "bytes", "triton", "--"),
    *("--help", "-h", "cram-1m", "maru-1m", "float16", "float64", "positions", "1M", "1e3M", "-5k", "0b", "1TT"),
)
PIECES = (b"\0", b"\xff\xfe", b"{", b"[" * 3000, b'"a": 1, "a": 2,', b"NaN", b"1e999", b"9" * 5000, b"\n\n", b"&a *a", b"!!x ")
VALUES = (b"-1", b"1000000000", b"9" * 30, b"null", b'"x"', b"[]", b"{}", b"true", b"1.5")
Input = tuple[str, Callable[[], list[str]]]  # what it is, and what makes its files and gives its command


class Place:
    """A run, its corpus, its ξ and its graph, from which each input gets a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = folder / "text.txt"
        text.write_text("Four score and seven years ago our fathers brought forth a new nation. " * 60)
        np.save(folder / "frames.npy", np.random.default_rng(0).random((60, 3), np.float32))
        publish(folder / "published")
        self.model = ["--model.preset", "cram-demo", "--model.overrides.d_model", "8", "--model.overrides.n_layers", "1"]
        self.small = ["--steps", "2", "--seq_len", "8", "--batch_size", "2", "--threads", "1", "--device", "cpu", "--backend", "torch"]
        self.made("train", *self.model, *self.small, "--data.corpus", text, "--out", folder / "run", "--log_every", "1")
        self.made("precompute", folder / "xi", "--corpus", text)
        self.made("export", folder / "run", "--out", folder / "model.onnx")
        self.made("run", folder / "model.onnx", "--max_new_tokens", "2", "--save_state", folder / "state")

    def made(self, *words: object) -> None:
        code, err = quietly([str(word) for word in words])
        if code:
            raise SystemExit(f"the place for bad inputs could not be made: {err}")

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.folder, to))


def publish(folder: Path) -> None:
    """A small Mamba as transformers saves one."""
    folder.mkdir()
    names = {"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"}
    params = init_params(preset("mamba-1m", d_model=4, n_layers=1))
    save_file({names.get(name, f"backbone.{name}"): a for name, a in params.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "mamba", "vocab_size": 256, "hidden_size": 4, "num_hidden_layers": 1, "expand": 2}')
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}')


def quietly(words: list[str]) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = cli.main(words)
    return code, err.getvalue()


def arguments(place: Place, rng: random.Random) -> Iterator[Input]:
    """Texts that do not belong where they stand."""
    import importlib

    run, text = str(place.folder / "run"), str(place.folder / "text.txt")
    base = {
        "evaluate": [run, "--corpus", text, "--limit", "20", "--backend", "numpy"],
        "generate": [run, "--max_new_tokens", "2", "--backend", "numpy"],
        "run": [str(place.folder / "model.onnx"), "--max_new_tokens", "2"],
        "precompute": ["OUT", "--corpus", text],
        "export": [run, "--out", "OUT"],
        "match": [],
        "importing": [str(place.folder / "published"), "--out", "OUT"],
        "compare": ["--corpus", text, "--params", "20k", "--steps", "1", "--out", "OUT", "--models", "[]"],
        "inspect": [run, "--out", "OUT", "--length", "4"],
        "train": [*place.model, *place.small, "--data.corpus", text, "--out", "OUT"],
    }
    tables = {verb: of_function(importlib.import_module(f"unisono_tools.commands.{verb}").run) for verb in VERBS}
    tables["train"] = of_class(TrainConfig)
    while True:
        verb = rng.choice(list(base))
        argument, value = rng.choice(tables[verb]), rng.choice(TEXTS)
        if (argument.name, value) == ("max_new_tokens", str(2**31)):
            continue  # it would do it
        words = list(base[verb])
        if argument.open and rng.random() < 0.7:
            field = rng.choice([*preset(rng.choice(("cram-demo", "lat-1m", "maru-1m"))).to_dict(), "", "a.b", "class_path"])
            words += [f"--{argument.name}.{field}", value]
        elif f"--{argument.name}" in words or argument.name not in ("model", "out", "checkpoint", "source"):
            words += [f"--{argument.name}", value] if rng.random() < 0.5 else [f"--{argument.name}={value}"]
        else:
            words[0:1] = [value]
        yield f"{verb} {argument.name}={value[:40]!r}", lambda verb=verb, words=words: [NAMES.get(verb, verb), *words]


FILES = {
    "run/config.yaml": ["train", "--resume", "PLACE/run", "--steps", "3"],
    "run/log.jsonl": ["train", "--resume", "PLACE/run", "--steps", "3"],
    "run/checkpoints/step-00000002/trainer.json": ["eval", "PLACE/run", "--limit", "20", "--backend", "numpy"],
    "run/checkpoints/step-00000002/model.safetensors": ["eval", "PLACE/run", "--limit", "20", "--backend", "numpy"],
    "run/checkpoints/step-00000002/optimizer.safetensors": ["train", "--resume", "PLACE/run", "--steps", "3"],
    "text.txt": ["eval", "PLACE/run", "--corpus", "PLACE/text.txt", "--limit", "20", "--backend", "numpy"],
    "frames.npy": ["precompute", "PLACE/f", "--preset", "cram-video", "--overrides.frame_size", "3", "--corpus", "PLACE/frames.npy"],
    "xi/manifest.json": ["precompute", "PLACE/xi", "--corpus", "PLACE/text.txt"],
    "xi/xi.npy": ["train", "--mode", "positions", "--data.precomputed", "PLACE/xi", "--data.corpus", "PLACE/text.txt", "--steps", "1"],
    "xi/ids.npy": ["precompute", "PLACE/xi", "--corpus", "PLACE/text.txt"],
    "published/config.json": ["import", "PLACE/published", "--out", "PLACE/imported"],
    "published/model.safetensors": ["import", "PLACE/published", "--out", "PLACE/imported"],
    "published/tokenizer.json": ["import", "PLACE/published", "--out", "PLACE/imported"],
    "model.onnx": ["generate", "PLACE/model.onnx", "--backend", "onnx", "--max_new_tokens", "2"],
    "state": ["run", "PLACE/model.onnx", "--state", "PLACE/state", "--max_new_tokens", "2"],
}


def damages(rng: random.Random) -> dict[str, Callable[[Path], None]]:
    """What can happen to a file."""

    def bytewise(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
        def damage(path: Path) -> None:
            path.write_bytes(change(bytearray(path.read_bytes())))

        return damage

    def flipped(data: bytearray) -> bytearray:
        for _ in range(rng.choice((1, 3, 50))):
            data[rng.randrange(min(len(data), rng.choice((64, 4096, 10**9))))] ^= 1 << rng.randrange(8)
        return data

    def inserted(data: bytearray) -> bytearray:
        at = rng.randrange(min(len(data), 2000))
        piece = rng.choice(
            (b"\0", b"\xff\xfe", b"{", b"[" * 3000, b'"a": 1, "a": 2,', b"NaN", b"1e999", b"9" * 5000, b"\n\n", b"&a *a", b"!!x ")
        )
        return data[:at] + piece + data[at:]

    def block(data: bytearray) -> bytearray:
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        return data[:a] + rng.choice((bytes(b - a), data[a:b] * 2, b"", os.urandom(b - a))) + data[b:]

    def number(data: bytearray) -> bytearray:
        import re

        found = list(re.finditer(rb"[0-9]+", bytes(data[:4000])))
        if not found:
            return data
        m = rng.choice(found)
        return (
            data[: m.start()]
            + rng.choice((b"-1", b"1000000000", b"9" * 30, b"null", b'"x"', b"[]", b"{}", b"true", b"1.5"))
            + data[m.end() :]
        )

    def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            path.unlink()
            make(path)

        return change

    return {
        "truncated": bytewise(lambda data: data[: rng.randrange(len(data))]),
        "flipped": bytewise(flipped),
        "inserted": bytewise(inserted),
        "block": bytewise(block),
        "number": bytewise(number),
        "empty": bytewise(lambda data: b""),
        "longer": bytewise(lambda data: data + os.urandom(rng.randrange(1, 100))),
        "missing": replaced(lambda path: None),
        "folder": replaced(Path.mkdir),
        "pipe": replaced(os.mkfifo),
        "loop": replaced(lambda path: path.symlink_to(path)),
        "zero": replaced(lambda path: path.symlink_to("/dev/zero")),
    }


def files(place: Place, rng: random.Random, folder: Path) -> Iterator[Input]:
    """Damage to what the command reads."""
    while True:
        name, how = rng.choice(list(FILES)), rng.choice(list(damages(rng)))
        seed = rng.random()

        def make(name: str = name, how: str = how, seed: float = seed) -> list[str]:
            mine = place.copy(folder / f"{seed}")
            damages(random.Random(seed))[how](mine / name)
            extra = [*place.model, *place.small[2:], "--out", str(mine / "p")] if "--mode" in FILES[name] else []
            return [*(word.replace("PLACE", str(mine)) for word in FILES[name]), *extra]

        yield f"{name} {how}", make


def judged(words: list[str], out: Path) -> str | None:
    """What is wrong with how the command ended; None where nothing is."""
    words = [str(out) if word == "OUT" else word for word in words]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(out.parent)
        try:
            code, err = quietly(words)
            lines = [line for line in err.splitlines() if "error: " in line]
            bad = "" if code in (0, 130) or (code == 2 and len(lines) == 1 and "Traceback" not in err) else f"exit {code}: {err[-600:]}"
        except SystemExit as stop:  # --help
            bad = "" if stop.code == 0 else f"SystemExit {stop.code}"
        except BaseException:
            bad = traceback.format_exc()[-1500:]
        os.write(write, bad.encode(errors="backslashreplace")[:4000])
        os._exit(0)
    os.close(write)
    begun = time.monotonic()
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() - begun > SECONDS:
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    with os.fdopen(read, "rb") as file:
        bad = file.read().decode()
    return bad or (f"status {done[1]} after {time.monotonic() - begun:.0f} s" if done[1] else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--number", type=int, default=1700)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    init_params(preset("cram-demo"))
    rng, counts, wrong = random.Random(chosen.seed), Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "place").mkdir()
        place = Place(folder / "place")
        streams = (arguments(place, rng), files(place, rng, folder))
        for i in range(chosen.number):
            what, make = next(streams[i % 2])
            words = make()
            (folder / "out").mkdir()
            bad = judged(words, folder / "out" / "it")
            counts["bad" if bad else "good"] += 1
            if bad:
                wrong += 1
                print(f"{what}\n  {words}\n  {bad}\n", flush=True)
            for left in (folder / "out", *folder.glob("0.*")):
                shutil.rmtree(left, ignore_errors=True)
    print(f"{chosen.number} bad inputs (seed {chosen.seed}): {wrong} ended otherwise than with exit code 0, or 2 and one line")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
