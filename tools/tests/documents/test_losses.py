"""docs/where-we-lose.md: each figure stands on the page that its row links, and × is what it says."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs/where-we-lose.md"
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])")
ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \| ([\d.]+) \| \[.+?\]\((.+?)\) \|$", re.MULTILINE)
MORE_IS_BETTER = ("tokens a call", "tokens a second", "right", "of the variance")


def figures(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def test_each_figure_is_where_it_comes_from():
    text = PAGE.read_text("utf-8")
    rows = ROW.findall(text)
    tables = [line for line in text.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) == len(tables) > 20
    for what, ours, better, ratio, link in rows:
        source = (PAGE.parent / link).read_text("utf-8")
        mine, others = NUMBER.findall(ours), NUMBER.findall(better)[-1:]
        assert mine
        assert others
        for figure in (*mine[-1:], *others):
            assert figure in figures(source), f"{what}: {link} has no {figure}"
        a, b = (float(x.replace(",", "")) for x in (mine[-1], others[0]))
        worse = b / a if any(words in what for words in MORE_IS_BETTER) else a / b
        assert worse > 1, f"{what}: we do not lose"
        assert f"{worse:.2f}" == ratio, f"{what}: × is {worse:.2f}"
