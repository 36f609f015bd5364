"""Every link of README and docs: files, headings and the names of code that they lead to are there; others are addresses."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from unisono_tools import cli

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```\s*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`[^`\n]*`")


def _load(name: str, path: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def symbols(path: Path) -> dict[str, tuple[int, int]]:
    return _load("symbols", "docs/_site/symbols.py").symbols(path.read_text("utf-8"))


@functools.cache
def anchors(path: Path) -> set[str]:
    """Of a page: its headings as viewers of repositories name them, and the ids that it gives."""
    text = FENCE.sub("", path.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h).lower()).replace(" ", "-") for h in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def links(page: Path) -> list[tuple[str, bool]]:
    """(target, whether it is a picture) of each link in the text, not in code."""
    text = SPAN.sub(lambda m: m[0] if "](" in m[0] else "", FENCE.sub("", page.read_text("utf-8")))
    return [(target, bool(mark)) for mark, target in LINK.findall(text)]


def problem(page: Path, target: str) -> str | None:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        fine = parts.scheme == "https" and "." in parts.netloc and not re.search(r"[\s<>\"]", target)
        return None if fine else "no https address"
    path = (page.parent / parts.path).resolve() if parts.path else page
    if not path.is_relative_to(ROOT) or not path.is_file():
        return "no such file"
    if not parts.fragment:
        return None
    known = symbols(path) if path.suffix == ".py" else anchors(path) if path.suffix == ".md" else {}
    return None if parts.fragment in known else f"nothing there is called {parts.fragment}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not [f"{target}: {why}" for target, _ in links(page) if (why := problem(page, target))]


def test_a_dead_link_is_found():
    here = ROOT / "docs/kernels.md"
    for target in ("no.md", "results", "status.md#nothing", "../noxfile.py#nothing", "http://example.com", "https://nowhere"):
        assert problem(here, target), target
    for target in ("status.md#status", "../noxfile.py#install", "conformance.md#p5r", "https://example.com/a"):
        assert problem(here, target) is None, target


ARCHITECTURES = sorted((ROOT / "docs/architectures").glob("*.md"))
ROOMS = ("spec/unisono_spec", "impl_jax/unisono_jax", "impl_torch/unisono_torch", "impl_onnx/unisono_onnx")


@pytest.mark.parametrize("page", ARCHITECTURES, ids=lambda page: page.stem)
def test_each_equation_names_its_lines(page):
    """In every room, functions or classes whose text is the equation's: the line after it links them by name."""
    found = re.findall(r"^\$\$\n(.+?)\n\$\$\n\n(.*?)$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    for equation, lines in found:
        assert lines.startswith("Lines: "), equation
        named = [target for _, target in LINK.findall(lines) if "#" in target]
        missing = [room for room in ROOMS if not any(room in target for target in named)]
        assert not missing, f"{equation}: no lines in {missing}"


def test_notebooks_are_committed_without_outputs():
    """They are executed when the site is built: what is shown there is what the code of that day does."""
    notebooks = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
    assert len(notebooks) >= 2
    for path in notebooks:
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            assert not cell.get("outputs"), path.name
            assert cell.get("execution_count") is None, path.name


def test_every_page_has_a_place_in_the_navigation():
    pages = {str(page.relative_to(ROOT).with_suffix("")) for page in (*PAGES, *(ROOT / "docs").rglob("*.ipynb"))}
    named = set()
    for root, groups in _load("nav", "docs/_site/nav.py").TREES.items():
        folder = Path(root).parent
        named |= {str(folder / name) for names in groups.values() for name in names}
    assert pages <= named


def test_every_verb_has_its_help_on_the_site():
    page = (ROOT / "docs/api/commands.md").read_text("utf-8")
    assert re.findall(r"^## unisono (\w+)\n\n```\{command-help\} \1\n```$", page, re.MULTILINE) == list(cli.VERBS)


def test_what_is_built_is_checked(tmp_path):
    """The site's own check: a page that leads nowhere, one that fetches, and one that is in order."""
    problems = _load("check", "docs/_site/check.py").problems
    assert problems(tmp_path)
    good = '<a href="b.html#here">b</a> <a href="https://example.com">out</a> <img src="p.png"> <link rel="canonical" href="https://x.org">'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<p id="here">')
    (tmp_path / "p.png").write_bytes(b"")
    assert problems(tmp_path) == []
    for bad in ('<a href="b.html#there">', '<a href="c.html">', '<script src="https://cdn.example/x.js">', '<a href="repo:x.py">'):
        (tmp_path / "a.html").write_text(bad)
        assert problems(tmp_path), bad
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "a.css").write_text("@font-face { src: url(https://fonts.example/f.woff2) }")
    assert problems(tmp_path)


def test_names_have_lines():
    lines = symbols(ROOT / "spec/unisono_spec/ops/decayed_sum.py")
    text = (ROOT / "spec/unisono_spec/ops/decayed_sum.py").read_text("utf-8").splitlines()
    first, last = lines["step"]
    assert text[first - 1].startswith("def step(")
    assert text[last - 1].startswith("    return ")
    assert "CRAM.readout" in symbols(ROOT / "impl_torch/unisono_torch/models/cram.py")
