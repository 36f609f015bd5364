"""Kills a run at random moments by several signals, each time starting it again; then compares it with one that was never interrupted.

python tools/tests/services/kills.py torch 50
python tools/tests/services/kills.py jax 50 --data.order streamed --ema 0.9
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from unisono_tools import cli
from unisono_tools.backends import backend as loaded
from unisono_tools.train import checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGKILL)
STEPS = 30  # for each kill: more than a run makes from one to the next


def start(argv: list[str]) -> int:
    """The command in a child, which is forked: the imports are there. Its output goes to said.txt."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = cli.main(argv)
        sys.stdout.flush()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def rows(run: Path) -> list[dict]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in ("time", "rate")} for line in lines]


def kill(argv: list[str], run: Path, number: int) -> Counter:
    """Each signal with each exit code, how often; what is wrong raises an AssertionError."""
    moments, codes = random.Random(7), Counter()
    log = run / "log.jsonl"
    while codes.total() < number:
        sent, early = moments.choice(SIGNALS), moments.random() < 0.15
        before = log.stat().st_mtime_ns if log.exists() else 0
        child = start([*argv, "--out", str(run)])
        deadline = time.monotonic() + (moments.uniform(0, 0.5) if early else 120)
        while time.monotonic() < deadline and (early or (log.stat().st_mtime_ns if log.exists() else 0) == before):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.06))
        os.kill(child, sent)
        code, said = ended(child), Path("said.txt").read_text()
        assert code in (-sent, 128 + sent), (sent.name, code, said)
        # what Python says of a KeyboardInterrupt that it drops
        assert "Traceback" not in said or "Exception ignored" in said, said
        codes[sent.name, code] += 1
    return codes


def main(backend: str, number: int, more: list[str]) -> None:
    loaded(backend)
    os.chdir(tempfile.mkdtemp())
    Path("text.txt").write_text("Four score and seven years ago our fathers brought forth on this continent a new nation. " * 400)
    argv = ["train", "--config", "cram-demo", "--data.corpus", "text.txt", "--model.overrides", "{d_model: 16, n_layers: 2, dropout: 0.1}"]
    argv += [
        "--backend",
        backend,
        "--threads",
        "1",
        "--steps",
        str(STEPS * number),
        "--batch_size",
        "4",
        "--seq_len",
        "32",
        "--log_every",
        "1",
    ]
    argv += ["--eval_every", "37", "--checkpoint_every", "10", "--data.eval_tokens", "256", "--schedule.warmup_steps", "10", *more]
    whole, run = Path("whole"), Path("killed")
    assert ended(start([*argv, "--out", str(whole)])) == 0, Path("said.txt").read_text()
    codes = kill(argv, run, number)
    assert ended(start([*argv, "--out", str(run)])) == 0, Path("said.txt").read_text()
    assert rows(run) == rows(whole)
    for ours, theirs in zip(*(sorted(path.iterdir()) for path in (checkpoint.latest(run), checkpoint.latest(whole)) if path), strict=True):
        assert ours.suffix != ".safetensors" or ours.read_bytes() == theirs.read_bytes(), ours
    told = ", ".join(f"{name} {code}: {times}" for (name, code), times in sorted(codes.items()))
    print(f"{backend}: {number} kills ({told}); log, weights and moments are those of a run without one")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
