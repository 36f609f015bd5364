"""unisono conform"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from unisono_spec.contract import InputError

HELP = """usage: unisono conform --impl IMPL [options of the court and of pytest]

Judge an implementation by the court's properties: numpy, jax, torch, onnx, or your own as package.module:factory
(docs/conformance.md has a worked example). The exit code is the court's: 0 where every property holds.

  --impl IMPL                 what to judge
  --arch, --device, --dtype, --form, --implementation, --profile, --truth, --report
                              restrict and configure the court; `unisono conform --impl numpy --court-help` explains them
"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if not any(word == "--impl" or word.startswith("--impl=") for word in argv):
        raise InputError("impl: missing; add --impl numpy, jax, torch, onnx, or package.module:factory")
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        raise InputError("conform: the court is not installed here; pip install 'unisono[conformance]'")
    argv = ["--help" if word == "--court-help" else word for word in argv]
    court = ["-m", "pytest", "-p", "unisono_conformance.plugin", "--pyargs", "unisono_conformance"]
    return subprocess.run([sys.executable, *court, *argv], check=False).returncode
