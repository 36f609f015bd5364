"""What kernels of a decoded token share: when they begin, what programs of a launch wait for, norms, activations, convolutions.

They begin before the one before them has ended (EARLY: programmatic dependent launch, compute capability 9): they read weights, which
nobody writes, then wait for its results.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unisono_torch.kernels import barrier
from unisono_torch.kernels.gelu import share, sigmoid
from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops.elementwise import LAYER_NORM_EPS, SHRINK

NORMS = {"none": 0, "rms": 1, "layer": 2}
# activations of one product, then those of two
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "swiglu": 4, "gated_gelu": 5, "glu": 6}
# LayerNorm of rows up to 10²⁹: their differences from the mean are shrunk first, and ε alike
SHRUNK = tl.constexpr(SHRINK)
LAYER_EPS = tl.constexpr(LAYER_NORM_EPS * SHRINK**2)


@triton.jit
def ready(EARLY: tl.constexpr):
    """Let the next kernel begin, and wait for the results of the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def loaded():
    """Between loads of a state and stores to it: several warps may hold a small tile, of which one stores, and others may lag behind."""
    tl.debug_barrier()


@triton.jit
def begun(EARLY: tl.constexpr):
    """Let the next kernel begin: this program waits for others of its own launch."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def done(counters, TOGETHER: tl.constexpr):
    """What `finished` programs of this launch wait for is stored."""
    if TOGETHER:
        barrier.arrive(counters)


@triton.jit
def waited(counters, ARRIVALS: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr):
    """Let the next kernel begin, and wait for ARRIVALS programs of this one, which are `done`, or, of none, as `ready`."""
    if ARRIVALS > 0:
        begun(EARLY)
        if TOGETHER:
            barrier.wait(counters, ARRIVALS)
    else:
        ready(EARLY)


@triton.jit
def left(counters, PROGRAMS: tl.constexpr, TOGETHER: tl.constexpr):
    """One of PROGRAMS that `waited` is done, too: counters [2], arrived and left, are 0 after the last."""
    if TOGETHER and tl.atomic_add(counters + 1, 1) == PROGRAMS - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@triton.jit
def last(turns, SLICES: tl.constexpr):
    """Whether this is the last of SLICES programs to come here: the others have read what it may change now. The next time begins anew."""
    ends = True
    if SLICES > 1:
        tl.debug_barrier()
        ends = tl.atomic_add(turns, 1) == SLICES - 1
        if ends:
            tl.store(turns, 0)
    return ends


@triton.jit
def exact_gelu(x):
    return x * share(x)


@triton.jit
def normed(x, k, K: tl.constexpr, gain, shift, NORM: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr):
    """The norm of a row x, float32 and zero from K on, rounded to TYPE."""
    if NORM == 1:
        x = x / tl.sqrt(tl.sum(x * x, 0) / K + EPS)
        x = (x * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)).to(TYPE).to(tl.float32)
    if NORM == 2:
        x = tl.where(k < K, (x - tl.sum(x, 0) / K) * SHRUNK, 0.0)
        x = x / tl.sqrt(tl.sum(x * x, 0) / K + LAYER_EPS)
        x = x * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32) + tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
        x = x.to(TYPE).to(tl.float32)
    return x


@triton.jit
def activated(y, gate, ACT: tl.constexpr, TYPE: tl.constexpr):
    """What ACTIVATIONS[…] = ACT makes of a product, and of a second one, both float32 and rounded to TYPE."""
    if ACT == 1:
        y = exact_gelu(y)
    if ACT == 2:
        y = y * sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if ACT == 3:
        y = tl.where(y < 0, 0.0, y)  # and a NaN stays one
    if ACT == 4:
        y = (y * sigmoid(y)).to(TYPE).to(tl.float32) * gate
    if ACT == 5:
        y = exact_gelu((y * sigmoid(gate).to(TYPE).to(tl.float32)).to(TYPE).to(tl.float32))
    if ACT == 6:
        y = y * sigmoid(gate).to(TYPE).to(tl.float32)
    return y


@triton.jit
def convolved(y, n, state, weight, bias, mask, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, TYPE: tl.constexpr):
    """SiLU of channels n of the convolution at the token y, float32; weight [D, 1, TAPS], state [TAPS − 1, D], which moves on."""
    total = y * tl.load(weight + n * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    before = ()
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(state + tap * D + n, mask=mask, other=0.0)
        total += old * tl.load(weight + n * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
        before = before + (old,)  # noqa: RUF005 (Triton's tuples grow by +)
    loaded()
    for tap in tl.static_range(1, TAPS - 1):
        tl.store(state + (tap - 1) * D + n, before[tap], mask=mask)
    if TAPS > 1:
        tl.store(state + (TAPS - 2) * D + n, y, mask=mask)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    total = total.to(TYPE).to(tl.float32)
    return total * sigmoid(total)


@triton.jit
def rows_convolved(
    y, m, n, state, weight, bias, mask, CHANNELS: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """y [m, n], whose columns below CHANNELS are `convolved`, each row's with its part of the state [·, TAPS − 1, CHANNELS]."""
    c = n[None, :] + 0 * m[:, None]
    own = state + m.to(tl.int64)[:, None] * ((TAPS - 1) * CHANNELS)
    through = convolved(y, c, own, weight, bias, mask & (c < CHANNELS), CHANNELS, TAPS, HAS_BIAS, TYPE)
    return tl.where(c < CHANNELS, through, y)


@functools.cache
def early(device: torch.device) -> bool:
    """Whether kernels there can begin before the one before them has ended."""
    return not interpreted() and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(device: torch.device) -> dict[str, Any]:
    """What every kernel of a token is launched with."""
    return {"EARLY": early(device), **({"launch_pdl": True} if early(device) else {})}


def kind_of(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def dot_of(dtype: torch.dtype) -> Any:
    """In what products are taken; the interpreter knows none of 16 bits."""
    return tl.float32 if interpreted() else kind_of(dtype)
