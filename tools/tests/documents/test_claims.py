"""docs/claims.md: each figure that a row says was measured, or judges by, stands on a page that it links or whose command it names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unisono_spec.contract import count_params, preset, presets

DOCS = Path(__file__).parents[3] / "docs"
RESULTS = DOCS / "results"
FIGURE = re.compile(r"(?<![\w.,])(?<!section )\d[\d,]*\.\d+(?![\w])|(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\w])")
# pages that commands make, where these are no tables of `unisono experiment`
PAGES = {
    "bench.lengths": "results/lengths-h200.md",
    "bench.linear": "results/linear-cpu.md",
    "bench.decode": "results/decode-h200.md",
    "bench.lat": "results/lat-cpu.md",
    "bench.jax": "results/kernels-jax-h100.md",
    "bench.ssm": "results/trained-ssm-h200.md",
    "unisono task dna": "results/tasks.md",
}


def numbers(page: Path) -> Iterator[float]:
    """Those of a page, and steps, tokens a second and GB of the runs behind it."""
    if page.suffix == ".md":
        yield from (float(figure.replace(",", "")) for figure in FIGURE.findall(page.read_text("utf-8")))
    runs = page.with_suffix(".json")
    if runs.is_file() and page.parent == RESULTS:
        yield from _runs(json.loads(runs.read_text("utf-8")))


def _runs(content: Any) -> Iterator[float]:
    if isinstance(content, dict):
        yield from (content[name] for name in ("steps", "tokens_a_second") if isinstance(content.get(name), int | float))
        if isinstance(content.get("peak_bytes"), int):
            yield content["peak_bytes"] / 1e9
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _runs(part)


def rows() -> Iterator[tuple[str, set[Path]]]:
    """Each, and the pages that it links or whose command it names."""
    before = set[Path]()
    for row in (DOCS / "claims.md").read_text("utf-8").splitlines():
        if not row.startswith("| ") or row.startswith("| claim |"):
            continue
        pages = {DOCS / link for link in re.findall(r"\]\(([^)#]+)", row)} | {DOCS / page for name, page in PAGES.items() if name in row}
        pages |= {RESULTS / f"{name}.md" for name in re.findall(r"[`( ]([\w-]+)`", row) if (RESULTS / f"{name}.md").is_file()}
        pages |= before if "the same" in row or "as above" in row else set()
        yield row, pages
        before = pages


def test_each_figure_is_where_it_comes_from():
    paper = preset("cram-paper")
    counts = [count_params(config) for config in presets().values()]
    counts += [count_params(paper) - 2 * paper.d_model * (paper.vocab_size + 1)]  # without embedding, head and last norm
    checked = 0
    for row, pages in rows():
        claim, *cells = row.strip("| ").split(" | ")
        own = [float(figure) for figure in re.findall(r"\d+\.\d+", claim)]
        known = {*counts, *own, *map(math.log2, own)}.union(*map(numbers, pages))
        for figure in FIGURE.findall(f"{cells[-3]} {cells[-1]}"):  # measured, verdict
            decimals = len(figure.partition(".")[2])
            assert any(f"{number:,.{decimals}f}" == figure for number in known), f"{claim}: {figure} is on none of {pages}"
            checked += 1
    assert checked > 150


def test_a_gpu_that_a_row_names_is_one_of_its_pages():
    checked = 0
    for row, pages in rows():
        for gpu in re.findall(r"on an (H\d00)", row):
            assert any(gpu in page.read_text("utf-8") for page in pages), f"{row}: {gpu} is on none of {pages}"
            checked += 1
    assert checked > 8
