"""Several processes and devices have the losses, weights, moments, averages and states of one that computes the same microbatches."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))
from several import CASES, alone, run  # pyright: ignore[reportMissingImports]

SCRIPT = Path(__file__).with_name("several.py")
# JAX's devices of one process and of two have the same
truth_of = functools.cache(lambda by, name: run(alone(CASES[by][name])))
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("by", "launch", "devices"), [("torch", TORCHRUN, 1), ("jax", (), 2), ("jax", TORCHRUN, 1)], ids=["torch", "jax", "jax-processes"]
)
def test_two_are_one(by, launch, devices, tmp_path, close):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}
    command = [sys.executable, *launch, str(SCRIPT), by, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in CASES[by]:
        found, truth = load_file(tmp_path / f"{name}.safetensors"), truth_of(by, name)
        assert found.keys() == truth.keys()
        # the smallest of them are differences of large ones: what rounding may do to a kind is told by its largest number
        for kind in ("loss", "norm", "logits", "m.", "v.", "carried.", "average.", ""):
            of = [key for key in truth if key.startswith(kind)]
            ours, theirs = (np.concatenate([arrays[key].ravel() for key in of] or [np.zeros(1)]) for arrays in (found, truth))
            close(ours, theirs, "float64", f"{name}: {kind}")
        assert np.abs(truth["loss"]).min() > 0
