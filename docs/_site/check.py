"""The built site: each internal link and anchor leads somewhere, and no page fetches anything from elsewhere. FOLDER"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
NAMED_ONLY = ("canonical", "search", "prev", "next", "index", "author")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        at = FETCHED.get(tag)
        if at and given.get(at) and given.get("rel") not in NAMED_ONLY:
            self.fetched.append(given[at] or "")


def problems(folder: Path) -> list[str]:
    pages = {path.resolve(): Page(path.read_text("utf-8")) for path in folder.rglob("*.html")}
    out = []
    for path, page in pages.items():
        where = path.relative_to(folder.resolve())
        for link in (*page.links, *page.fetched):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.fetched and parts.scheme != "data":
                    out.append(f"{where}: fetches {link}")
                elif parts.scheme not in ("https", "http", "mailto", "data"):
                    out.append(f"{where}: {link} has an unknown scheme")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                out.append(f"{where}: {link}: no such file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                out.append(f"{where}: {link}: no such anchor")
    sheets = {sheet: sheet.read_text("utf-8") for sheet in folder.rglob("*.css")}
    out += [
        f"{sheet.relative_to(folder)}: fetches from elsewhere" for sheet, text in sheets.items() if "url(http" in text or "@import" in text
    ]
    return [] if pages and not out else out or [f"{folder}: no page"]


def main(folder: Path) -> int:
    found = problems(folder)
    print("\n".join(found) or "links, anchors and what pages fetch: all in order")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
