"""What README and docs print is true: Python and commands run as pasted, and every command that is named anywhere is one.

Python blocks run in those sessions whose frameworks they import. Of commands, those that train or judge a whole room are only
read here; `nox -s documents` runs them, smaller. docs/from-the-papers.md is run by `nox -s services`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from unisono_tools import cli
from unisono_tools.commands.arguments import Argument, of_class, of_function
from unisono_tools.config import TrainConfig
from unisono_tools.train import checkpoint

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:unisono|python -m) [^`]+)`|^- command: (.+)$", re.MULTILINE)
# sessions that run this file, with the frameworks that are installed there
SESSIONS = {
    "onnx": {"torch", "onnx", "onnxruntime"},
    "alone": {"jax", "flax", "onnx", "onnxruntime"},
    "hf": {"torch", "onnx", "onnxruntime", "transformers"},
}
FRAMEWORKS = {"torch", "triton", "jax", "flax", "optax", "onnx", "onnxruntime", "transformers"}
ROOMS = {
    "unisono_torch": {"torch"},
    "unisono_torch.hf": {"torch", "transformers"},
    "unisono_jax": {"jax", "flax"},
    "unisono_onnx": {"onnx", "onnxruntime"},
}
RUN = ("list", "eval", "generate", "run", "export", "match", "inspect", "import")  # verbs that take seconds
PLACES = (
    "README.md",
    "docs/onnx.md",
    "docs/playground.md",
    "docs/published-weights.md",
)  # pages whose commands are run, each in a folder of its own


def fenced(page: Path, *kinds: str) -> list[str]:
    return [text for kind, text in FENCED.findall(page.read_text("utf-8")) if kind in kinds]


PYTHON = {f"{page.relative_to(ROOT)}-{i}": text for page in PAGES for i, text in enumerate(fenced(page, "python"))}


def needs(code: str) -> set[str]:
    """The frameworks that a block imports, by itself or through a room."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported |= {part for alias in node.names for part in (alias.name, alias.name.split(".")[0])}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module or "", (node.module or "").split(".")[0]}
    return (imported & FRAMEWORKS).union(*(ROOMS.get(name, set()) for name in imported))


HERE = [name for name, code in PYTHON.items() if all(map(importlib.util.find_spec, needs(code)))]


def commands(page: Path) -> list[str]:
    """Lines of the page's shell blocks, with their comments; of blocks without a language, those that begin as commands do."""
    lines = [line for text in fenced(page, "sh", "console") for line in text.replace("\\\n", " ").splitlines()]
    plain = [line for text in fenced(page, "") for line in text.splitlines() if line.startswith(("unisono ", "python -m ", "cd "))]
    return [line for line in (*lines, *plain) if line.strip()]


@pytest.fixture
def place(made, tiny, publish, tmp_path, monkeypatch, command):
    """A folder with the files that the documents name: runs, graphs, states, texts."""
    monkeypatch.chdir(tmp_path)
    model = checkpoint.save(tmp_path / "demo/run", made(tiny(), seed=1)) / "model.safetensors"
    shutil.copytree(tmp_path / "demo/run", tmp_path / "web/playground/model/run")
    shutil.copy(model, tmp_path / "model.safetensors")
    for graph in ("model.onnx", "web/playground/model/model.onnx"):
        assert command("export", model, "--out", tmp_path / graph)[0] == 0
    # under the name of a published one: a folder goes before the hub
    _tokenizer(publish(tmp_path / "state-spaces/mamba-130m-hf") / "tokenizer.json")
    (tmp_path / "speech.txt").write_text("Fellow citizens, " * 100)
    assert command("run", "model.onnx", "--max_new_tokens", 3, "--save_state", "unisono-400.safetensors")[0] == 0
    return tmp_path


def _tokenizer(path):
    """Of bytes, as GPT-NeoX's begins."""
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    model = Tokenizer(BPE(letters, []))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.save(str(path))


@pytest.mark.parametrize("name", HERE)
def test_python_runs_as_pasted(name, place):
    exec(compile(PYTHON[name], name, "exec"), {"__name__": "__main__"})


def test_every_python_block_runs_in_some_session():
    noxfile = (ROOT / "noxfile.py").read_text("utf-8")
    assert all(re.search(rf"def {session}\(.*?tools/tests/documents.*?\n\n\n", noxfile, re.DOTALL) for session in SESSIONS)
    nowhere = {name: needs(code) for name, code in PYTHON.items() if not any(needs(code) <= found for found in SESSIONS.values())}
    assert not nowhere, f"no session has the frameworks of {nowhere}"
    assert HERE


@pytest.mark.parametrize("page", PLACES)
def test_commands_run_as_pasted(page, place, capsys):
    for line in commands(ROOT / page):
        if "|" in line and "unisono" in line:
            path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
            done = subprocess.run(["sh", "-c", line], cwd=place, env={"PATH": path, "PYTHONUTF8": "1"}, capture_output=True)
            assert done.returncode == 0, (line, done.stderr.decode())
            continue
        words = shlex.split(line, comments=True)
        if words[0] != "unisono" or words[1] not in RUN or not _backend(words):
            continue
        code = cli.main(words[1:])
        assert code == 0, (line, capsys.readouterr().err)


def _backend(words: list[str]) -> bool:
    """Whether the backend that a command names is that of a session that has it: eval in JAX is run where JAX is."""
    named = words[words.index("--backend") + 1] if "--backend" in words else None
    return named in (None, "numpy", "onnx") or importlib.util.find_spec(named) is not None


EVERY = sorted({(str(page.relative_to(ROOT)), line) for page in PAGES for line in commands(page)})
SPANS = sorted({(str(p.relative_to(ROOT)), a or b) for p in PAGES for a, b in NAMED.findall(p.read_text("utf-8"))})


def test_every_command_is_one(monkeypatch):
    """Verbs and their arguments, modules, sessions and extras: what stands in blocks, in sentences, and above results."""
    monkeypatch.syspath_prepend(ROOT)  # as `python -m` has it
    assert len(EVERY) > 25
    assert len(SPANS) > 25
    wrong = []
    for page, line, parting in (*((*e, r"&&| \| ") for e in EVERY), *((*s, r"&&") for s in SPANS)):
        for part in re.split(parting, line.replace("…", "")):
            words = shlex.split(part.replace("\\\n", " "), comments=True)
            wrong += [f"{page}: {line}: {problem}" for problem in _problems(words)]
    assert not wrong, "\n".join(wrong)


def _problems(words: list[str]) -> list[str]:
    if words[:1] == ["unisono"]:
        return _problems_of_verb(*words[1:])
    if "pip" in words[:3] and "install" in words[:4]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        named = [extra for word in words if (m := re.search(r"\[(.+)\]", word)) for extra in m[1].split(",")]
        return [f"no extra {extra}" for extra in named if extra not in extras]
    if words[:2] != ["python", "-m"]:
        return []  # the system's: cat, cd, srun
    if words[2] == "nox":
        sessions = re.findall(r"@nox\.session.*\n(?:@.*\n)?def (\w+)", (ROOT / "noxfile.py").read_text("utf-8"))
        return [f"no session {name}" for name in words[4:5] if name not in sessions]
    return [] if words[2] in ("pytest", "http.server") or _is_module(words[2]) else [f"no module {words[2]}"]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:  # of a room whose framework is not here: a session that has it looks
        return error.name in FRAMEWORKS


def _problems_of_verb(verb: str = "VERB", *rest: str) -> list[str]:
    if verb.isupper() or verb.startswith("-"):
        return []
    if verb not in cli.VERBS:
        return [f"no verb {verb}"]
    if verb in ("conform", "bench"):  # pytest's arguments, and the benchmark's
        return []
    module = importlib.import_module(f"unisono_tools.commands.{cli.VERBS[verb][0]}")
    known = of_class(TrainConfig) if verb == "train" else of_function(module.run)
    names = [word[2:].partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")]
    allowed = {"config", "help", *(("resume", "dry_run") if verb == "train" else ())}
    return [f"no argument --{n}" for n in names if n not in allowed and not any(_fits(n, a) for a in known)]


def _fits(name: str, argument: Argument) -> bool:
    return name == argument.name or (argument.open and name.startswith(f"{argument.name}."))
