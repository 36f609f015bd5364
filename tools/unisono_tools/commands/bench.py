"""unisono bench"""

from __future__ import annotations

import subprocess
import sys

from unisono_tools.backends import backend


def main(argv: list[str]) -> int:
    backend("torch")
    return subprocess.run([sys.executable, "-m", "unisono_tools.bench", *argv], check=False).returncode
