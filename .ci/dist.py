"""Install the newest wheel of a folder away from the checkout, bare and with each extra: FOLDER CONSTRAINTS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FRAMEWORKS = {"jax", "flax", "torch", "onnx", "onnxruntime"}
# extra → (what must import then, the frameworks that it brings); the -cuda extras only add CUDA's own packages
EXTRAS = {
    "": ("unisono_spec", set()),
    "jax": ("unisono_jax", {"jax", "flax"}),
    "torch": ("unisono_torch", {"torch"}),
    "onnx": ("unisono_onnx", {"onnx", "onnxruntime"}),
    "onnx-export": ("unisono_torch.onnx", {"torch", "onnx", "onnxruntime"}),
    "hf": ("unisono_torch.hf", {"torch"}),
    "conformance": ("unisono_conformance.plugin", set()),
    "run": ("unisono_tools.commands.run", {"onnxruntime"}),
    "tools": ("unisono_tools.cli", set()),
    "docs": ("myst_nb", set()),
}


def main(folder: Path, constraints: Path) -> None:
    wheel = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    for extra, (module, brings) in EXTRAS.items():
        place = folder / f"venv-{extra or 'bare'}"
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        python = str(place / ("Scripts" if os.name == "nt" else "bin") / "python")
        target = f"{wheel}[{extra}]" if extra else str(wheel)
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", str(constraints), target], check=True)
        unwanted = sorted(FRAMEWORKS - brings)
        check = f"import {module}, importlib.util as u; found = [n for n in {unwanted} if u.find_spec(n)]; assert not found, found"
        subprocess.run([python, "-c", check], cwd=folder, check=True)
        print(f"{extra or 'bare'}: {module} imports, without {', '.join(unwanted)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
