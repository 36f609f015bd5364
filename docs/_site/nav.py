"""The site's navigation, which README and the results' page do not need where they are read as files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
TREES = {
    "README": {
        "Start": [
            "README",
            "docs/notebooks/train_and_look",
            "docs/notebooks/judge_your_own_layer",
            "docs/training",
            "docs/published-weights",
            "docs/from-the-papers",
            "docs/several-devices",
            "docs/onnx",
            "docs/playground",
        ],
        "Architectures": [f"docs/architectures/{name}" for name in ("cram", "lat", "infinityformer", "maru", "baselines")],
        "Evidence": [
            "docs/conformance",
            "docs/status",
            "docs/oracles",
            "docs/results/README",
            "docs/comparison",
            "docs/where-we-lose",
            "docs/claims",
            "docs/kernels",
        ],
        "Reference": [f"docs/api/{name}" for name in ("unisono", "spec", "torch", "jax", "onnx", "conformance", "commands")],
        "Project": ["docs/architecture", "CONTRIBUTING", "CHANGELOG", "conformance/unisono_conformance/vectors/README"],
    },
    "docs/results/README": {"": sorted(path.stem for path in RESULTS.glob("*.md") if path.stem != "README")},
}


def read(app: Any, docname: str, source: list[str]) -> None:
    for caption, names in TREES.get(docname, {}).items():
        named = ["Unisono <self>" if name == docname else name for name in names]
        option = f":caption: {caption}\n" if caption else ""
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n{option}\n" + "\n".join(named) + "\n```\n"


def finish(app: Any, error: Exception | None) -> None:
    """README's page is the site's first."""
    if error is None and app.builder.format == "html":
        out = Path(app.outdir)
        shutil.copy(out / "README.html", out / "index.html")


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", read)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True}
