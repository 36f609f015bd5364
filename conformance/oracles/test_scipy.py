"""The spec against SciPy: in `python -m nox -s jax` too. Differences are relative to the largest value."""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import scipy.signal
import scipy.special
from unisono_spec.ops import (
    decayed_sum,
    diagonal_ssm,
)

B, T, H, K, V = 2, 64, 3, 8, 16


def test_s4d(agree, random):
    """One channel is a continuous system of 2 P real states, sampled with a zero-order hold."""
    pairs, dt, D = 3, 0.05, 0.7
    A = np.stack([-random.uniform(0.2, 1, (1, pairs)), math.pi * np.arange(pairs)[None]], -1)
    C = random.normal(size=(1, pairs, 2))
    u = random.normal(size=(1, T, 1))
    ours, _ = diagonal_ssm.parallel(u, np.array([dt]), A, C, np.array([D]), np.zeros((1, 1, pairs, 2)))
    blocks = scipy.linalg.block_diag(*([[re, -im], [im, re]] for re, im in A[0]))
    into = np.tile([[1.0], [0.0]], (pairs, 1))
    out = 2 * np.stack([C[0, :, 0], -C[0, :, 1]], -1).reshape(1, -1)
    discrete = scipy.signal.cont2discrete((blocks, into, out, np.array([[D]])), dt, "zoh")
    # dlsim reads the state before it is updated, S4D after: the output is that of A_d h + B_d u
    Ad, Bd = discrete[0], discrete[1]
    _, theirs, _ = scipy.signal.dlsim((Ad, Bd, out @ Ad, out @ Bd + D, dt), u[0])
    agree("S4D, one channel", "scipy.signal.cont2discrete, dlsim", ours[0], theirs, "float64", T)


def test_fixed_cram(agree, random):
    x = random.normal(size=(B, T, 5))
    xi, _ = decayed_sum.parallel(x, 0.9, np.zeros((B, 5)))
    theirs = scipy.signal.lfilter([0.1], [1, -0.9], scipy.special.expit(x), axis=1)
    agree("CRAM, fixed scheme", "scipy.signal.lfilter", xi, theirs, "float64", T)
