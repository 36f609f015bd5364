"""Every kernel compiles for the GPUs it is meant for, with none present."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys


def test_kernels_compile_ahead_of_time(tmp_path):
    # a process of its own: this one interprets Triton's functions
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = pathlib.Path(__file__).with_name("aot.py")
    run = subprocess.run(
        [sys.executable, str(script)], env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "27 compiled\n"
