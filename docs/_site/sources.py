"""Links to files of the repository: each file that a page links has a page here, and `file.py#name` becomes the lines of that name.

In Markdown such a link is an ordinary relative one, which a repository's viewer follows, too.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from sphinx.util import logging
from symbols import symbols

LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```\s*$)", re.MULTILINE | re.DOTALL)
SHOWN = (".png", ".svg", ".gif")
logger = logging.getLogger(__name__)


def read(app: Any, docname: str, source: list[str]) -> None:
    """Relative links to what is no page of the site get the scheme `repo:`."""
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".md":
        return
    root = Path(app.srcdir).resolve()

    def link(match: re.Match[str]) -> str:
        target = (path.parent / match[1]).resolve()
        if target.suffix in SHOWN or not target.is_relative_to(root):
            return match[0]
        name = target.relative_to(root).as_posix()
        if target.is_dir():
            logger.warning("link to a folder: %s", match[1], location=docname)
        if not target.is_file() or app.env.path2doc(str(target)) in app.env.found_docs:
            return match[0]
        return f"repo:{name}{match[2] or ''}"

    parts = FENCE.split(source[0])
    source[0] = "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def resolve(app: Any, doctree: nodes.document, docname: str) -> None:
    used = vars(app).setdefault("unisono_sources", {})
    for node in doctree.findall(nodes.reference):
        if not node.get("refuri", "").startswith("repo:"):
            continue
        name, _, symbol = node["refuri"].removeprefix("repo:").partition("#")
        code = (Path(app.srcdir) / name).read_text("utf-8")
        uri = app.builder.get_relative_uri(docname, f"source/{name}")
        ranges = used.setdefault(name, {})
        if symbol:
            known = symbols(code) if name.endswith(".py") else {}
            if symbol not in known:
                logger.warning("%s defines no %s", name, symbol, location=docname)
                continue
            first, last = ranges[symbol] = known[symbol]
            uri += f"#L{first}-L{last}"
            node["reftitle"] = f"{name}, lines {first}–{last}"
        node["refuri"], node["internal"] = uri, True


def pages(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    for name, ranges in sorted(vars(app).get("unisono_sources", {}).items()):
        code = (Path(app.srcdir) / name).read_text("utf-8")
        shown = f"<div class='highlight source'><pre>{marked(name, code, set(ranges.values()))}</pre></div>"
        body = f"<h1 class='file'>{html.escape(name)}</h1>\n{shown}"
        yield f"source/{name}", {"title": name, "body": body, "parents": []}, "page.html"


def marked(name: str, code: str, ranges: set[tuple[int, int]]) -> str:
    """The code in HTML: an anchor a line, and one around each of the ranges, which contain one another or are apart."""
    lines = highlight(code, get_lexer_for_filename(name, stripnl=False), HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
    out = []
    for number, line in enumerate(lines, 1):
        for first, last in sorted(ranges, key=lambda r: -r[1]):
            if first == number:
                out.append(f'<span class="range" id="L{first}-L{last}">')
        out.append(f'<span class="line" id="L{number}"><a class="number" href="#L{number}">{number:4}</a> {line}\n</span>')
        out.extend("</span>" for _, last in ranges if last == number)
    return "".join(out)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", read)
    app.connect("doctree-resolved", resolve)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
