"""Build the site into a folder, which is emptied first, and check what was built: FOLDER"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import check
from sphinx.cmd.build import main as sphinx

HERE = Path(__file__).parent


def main(folder: Path) -> int:
    """The exit code: not 0 where Sphinx warned, or a link leads nowhere."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the notebooks' processes, whose models are small
    shutil.rmtree(folder, ignore_errors=True)
    return sphinx(["-E", "-W", "--keep-going", "-q", "-c", str(HERE.parent), str(HERE.parents[1]), str(folder)]) or check.main(folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
