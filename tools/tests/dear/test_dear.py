"""Commands of README and docs that train, or judge a whole room: as pasted, with less to do appended. Minutes: `nox -s documents`."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = ("README.md", "docs/comparison.md", "docs/conformance.md")
# first words → what is appended; later options override those before them
LESS = {
    "unisono train": "--model.overrides.d_model 8 --model.overrides.n_layers 1 --steps 4 --batch_size 2 --seq_len 16 "
    "--data.corpus TEXT --data.eval_tokens 64",
    "unisono compare": "--steps 2 --batch_size 2 --seq_len 16 --seeds 1 --models '[cram (fixed)]' --corpus TEXT --out compare",
    "unisono conform": "--profile dev --arch cram -k P8-",
    "python -m pytest ": "--profile dev --arch cram -k P8-",
}
ALONE = "own_implementation"  # a whole one for a single op: judged by all that it claims


def commands() -> list[tuple[str, str]]:
    """(page, line) of each such command, in blocks with or without a language."""
    out = []
    for page in PAGES:
        for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL):
            lines = text.splitlines() if kind in ("sh", "") else []
            out += [(page, line) for line in lines if line.startswith(tuple(LESS)) and "…" not in line]
    return out


@pytest.mark.parametrize(("page", "line"), commands())
def test_it_runs(page, line, text, tmp_path):
    words = shlex.split(line, comments=True)
    own = any(ALONE in word for word in words)
    less = "" if own else next(more for first, more in LESS.items() if line.startswith(first)).replace("TEXT", str(text))
    program = [sys.executable, "-m", "unisono_tools.cli"] if words[0] == "unisono" else [sys.executable]
    place = ROOT / "docs/examples" if own else tmp_path
    done = subprocess.run([*program, *words[1:], *shlex.split(less)], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}: {line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_there_are_such_commands():
    assert {first for first in LESS for _, line in commands() if line.startswith(first)} == set(LESS)
