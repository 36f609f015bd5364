"""S4D's matrix products have all of float32's digits, whatever is chosen for others, in other threads and inside torch.autocast."""

from __future__ import annotations

import threading

import pytest
import torch
from unisono_torch.kernels.diagonal_ssm import diagonal_ssm, products
from unisono_torch.kernels.registry import interpreted

from .test_diagonal_ssm import Case, differentiate, inputs, upstream_of

WAYS = ["high", "tf32"] if hasattr(torch.backends.cuda.matmul, "fp32_precision") else ["high"]  # PyTorch has the second since 2.9


@pytest.mark.parametrize("chosen", WAYS)
def test_products_keep_their_digits_whatever_is_chosen(device: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either of PyTorch's two ways, of which both stand as before afterwards."""
    matmul, product, found = torch.backends.cuda.matmul, torch.bmm, []
    before = getattr(matmul, "fp32_precision", None)
    monkeypatch.setattr(torch, "bmm", lambda *a, **how: (found.append(matmul.allow_tf32), product(*a, **how))[1])
    case = Case(2, 9 if interpreted() else products.LONG, 2, 2, torch.float32, marked=False)
    try:
        if chosen == "high":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        differentiate(diagonal_ssm, inputs(case, device)[0], upstream_of(case, device))
        if before is not None:
            assert matmul.fp32_precision == "tf32"
        if chosen == "high":
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        if chosen == "high":
            torch.set_float32_matmul_precision("highest")
        if before is not None:
            matmul.fp32_precision = before
    assert found == [False] * 5


def test_products_of_threads_do_not_lose_each_others_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor leave another choice than there was."""
    within, left, found = threading.Event(), threading.Event(), []

    def other() -> None:
        with products.whole():
            within.set()
            left.wait(30)
            found.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=other)
    torch.set_float32_matmul_precision("high")
    try:
        with products.whole():
            thread.start()
            within.wait(0.2)  # as long as it would take to come in
        left.set()
        thread.join(30)
        assert (found, torch.get_float32_matmul_precision()) == (["highest"], "high")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_nothing_is_cast_inside_autocast(device: str) -> None:
    """Whether a gradient is asked for there or outside."""
    case = Case(2, 9 if interpreted() else products.LONG, 2, 2, torch.float32, marked=False)
    tensors, _ = inputs(case, device)
    upstream = upstream_of(case, device)
    want = differentiate(diagonal_ssm, tensors, upstream)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = differentiate(diagonal_ssm, tensors, upstream)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
