"""JAX's threads do not come along when a process is forked: a model says so there, where XLA would wait for ever."""

from __future__ import annotations

import subprocess
import sys

FORKED = """
import os, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, unisono_jax as un
config = un.preset("cram-demo", d_model=4, n_layers=0)
if "late" in sys.argv:
    un.create(config)
child = os.fork()
if child == 0:
    try:
        un.create(config).init_state(1)
        os._exit(3)
    except un.InputError as error:
        os._exit(4 if "spawn" in str(error) else 5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_was_forked_too_late_is_told():
    for word, code in (("late", "4"), ("early", "3")):
        done = subprocess.run([sys.executable, "-c", FORKED, word], check=True, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == code, word
