"""The kernels' own functions without memory, where they fall to 0: each value and slope is held to itself."""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from unisono_conformance import tails
from unisono_torch.kernels import gelu
from unisono_torch.kernels.decode import common
from unisono_torch.kernels.linear_attention.sweep import _narrow, _phi, _slope
from unisono_torch.kernels.multiscale.functions import narrow
from unisono_torch.kernels.rotary.sweep import _phi as turned_phi
from unisono_torch.kernels.scan.sweep import _sigmoid, _sigmoid_and_slope
from unisono_torch.kernels.selective_scan import functions
from unisono_torch.ops import elementwise

CASES = (
    "sigmoid", "fast sigmoid", "sigmoid of the scan", "fast sigmoid of the scan", "sigmoid of a step", "softplus", "elu1", "gelu",
    "gelu_tanh",
)  # fmt: skip
SLOPES = ("sigmoid", "fast sigmoid", "elu1")


@triton.jit
def apply(x, y, slope, N: tl.constexpr, CASE: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    d = tl.zeros_like(a)
    if CASE == "sigmoid" or CASE == "fast sigmoid":
        b, d = _sigmoid_and_slope(a, CASE == "fast sigmoid")
    elif CASE == "sigmoid of the scan" or CASE == "fast sigmoid of the scan":
        b = _sigmoid(a, CASE == "fast sigmoid of the scan")
    elif CASE == "sigmoid of a step":
        b = common.sigmoid(a)
    elif CASE == "softplus":
        b = functions.softplus(a, tl.float32)
    elif CASE == "elu1":
        b = _phi(a, 1.0, "elu1")
        d = _slope(tl.full((N,), 1.0, tl.float32), a, 1.0, "elu1")
    elif CASE == "gelu":
        b = common.exact_gelu(a)
    else:
        b = a * functions.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    tl.store(y + i, b)
    tl.store(slope + i, d)


OVERFLOW = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's, of squares that may be infinite


@OVERFLOW
@pytest.mark.parametrize("case", CASES)
def test_tails(case: str, device: str) -> None:
    if case.startswith("fast") and device == "cpu":
        case = case.removeprefix("fast ")  # approximate units are a GPU's
    name = next(name for name in ("gelu_tanh", *tails.FUNCTIONS) if name in case)
    x = torch.tensor(np.concatenate([tails.points(name, "float32"), tails.limits("float32")]))
    padded = torch.zeros(128)
    padded[: len(x)] = x
    given = padded.to(device)
    y, slope = torch.empty_like(given), torch.empty_like(given)
    apply[(1,)](given, y, slope, 128, case)
    tails.hold(name, y[: len(x)].cpu().numpy(), x.numpy(), "float32")
    if case in SLOPES:
        tails.hold(name, slope[: len(x)].cpu().numpy(), x.numpy(), "float32", 1)


@OVERFLOW
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_and_its_slope(name: str, dtype: str, device: str) -> None:
    points = np.concatenate([tails.points(name, dtype), tails.limits(dtype)])
    x = torch.tensor(points.astype("float64")).to(device, getattr(torch, dtype))
    y, dx = gelu.forward(x, name == "gelu_tanh"), gelu.backward(torch.ones_like(x), x, name == "gelu_tanh")
    tails.hold(name, y.double().cpu().numpy(), points, dtype)
    tails.hold(name, dx.double().cpu().numpy(), points, dtype, 1)
    assert gelu.forward(x[:0], False).shape == (0,)
    if device == "cuda":  # as models call it
        x.requires_grad_()
        y = getattr(elementwise, name)(x)
        tails.hold(name, y.detach().double().cpu().numpy(), points, dtype)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=dtype == "float32")
        tails.hold(name, slope.detach().double().cpu().numpy(), points, dtype, 1)
        if dtype == "float32":
            tails.hold(name, torch.autograd.grad(slope.sum(), x)[0].double().cpu().numpy(), points, dtype, 2)


@triton.jit
def map_all(x, y, N: tl.constexpr, MAP: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(y + i, _phi(a, 1.0, MAP))
    tl.store(y + N + i, turned_phi(a, 1.0, MAP))
    tl.store(y + 2 * N + i, common.activated(a, a, 3, tl.float32))


@pytest.mark.parametrize("name", ["relu", "elu1", "learned", "none"])
def test_a_nan_stays_one(name: str, device: str) -> None:
    """A GPU's greater of a NaN and a number is the number."""
    x = torch.tensor([-1.0, torch.nan, 0.0, 2.0], device=device)
    y = torch.empty(3, 4, device=device)
    map_all[(1,)](x, y, 4, name)
    assert bool(y[:, 1].isnan().all())
    assert not bool(y[:, [0, 2, 3]].isnan().any())


@triton.jit
def shorten(x, y, z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, _narrow(tl.load(x + i), tl.float32, True))
    tl.store(z + i, narrow(tl.load(x + i), tl.float32, True))


def test_tf32_is_rounded_to_the_nearest(device: str) -> None:
    """Of two as near to the even one. The hardware drops a product's last 13 bits."""
    last = torch.tensor([0, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x3FFF], dtype=torch.int32)
    near = torch.tensor([0, 0, 0, 0x2000, 0x2000, 0x4000, 0x4000, 0x4000], dtype=torch.int32)
    for one in (0x3F800000, 0x3F800000 - 2**31):  # 1 and −1
        x = (one + last).view(torch.float32).to(device)
        y, z = torch.empty_like(x), torch.empty_like(x)
        shorten[(1,)](x, y, z, 8)
        assert torch.equal(y.cpu().view(torch.int32), one + near)
        assert torch.equal(z, y)
