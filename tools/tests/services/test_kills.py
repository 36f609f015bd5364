"""A run that several signals end at random moments, again and again, is the run that none did; `kills.py` says how many are survived."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_many_kills(backend):
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), backend, "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{backend}: 6 kills" in done.stdout
