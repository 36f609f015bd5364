"""What pages hold beside text: equations as MathML, docstrings as the Markdown that they are, the commands' own help."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from sphinx.util.docutils import SphinxDirective


def inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.math_block) -> None:
    # as wide as it is: what does not fit a phone scrolls
    for part in node.astext().split("\n\n"):
        writer.body.append(f'<div class="math">{convert(part.strip(), display="block")}</div>')
    raise nodes.SkipNode


class Markdown(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        return [nodes.raw("", MarkdownIt("commonmark").render("\n".join(self.content)), format="html")]


def docstring(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Docstrings here are no reStructuredText: asterisks, bars and underscores stand for themselves."""
    if any(lines):
        lines[:] = ["", ".. markdown::", "", *(f"   {line}" for line in lines), ""]


class CommandHelp(SphinxDirective):
    """`unisono VERB --help`, as it is printed."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "unisono_tools.cli", self.arguments[0], "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "92"}, check=False)
        text = done.stdout.strip()
        if done.returncode or not text:
            raise self.error(f"unisono {self.arguments[0]} --help: {done.stderr}")
        literal = nodes.literal_block(text, text)
        literal["language"] = "text"
        return [literal]


class EachModule(SphinxDirective):
    """automodule of each module of a package, a section each."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        import importlib
        import pkgutil

        package = importlib.import_module(self.arguments[0])
        lines = []
        for name in sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")):
            full = f"{package.__name__}.{name}"
            lines += [full, "-" * len(full), "", f".. automodule:: {full}", "   :members:", "   :no-index:", ""]
        return self.parse_text_to_nodes(StringList(lines, "modules"), allow_section_headings=True)


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.add_directive("markdown", Markdown)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("each-module", EachModule)
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True}
