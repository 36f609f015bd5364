"""Linear attention's kernels for a Hopper GPU, in Gluon, against sums over all pairs of tokens in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from unisono_conformance import judge
from unisono_torch.kernels.linear_attention import linear_attention, operator, padded, table

from .dense import NAMES, Case, budget, inputs, written_out

BF16, F32 = torch.bfloat16, torch.float32
SMALL = (
    Case(1, 70, 1, 64, 64, BF16, "elu1", segments=True),
    Case(1, 40, 2, 64, 128, BF16, "relu", packed=True),
    Case(1, 130, 1, 128, 64, BF16, "none", segments=True),
    Case(1, 66, 1, 128, 128, BF16, "elu1"),
    Case(1, 70, 1, 40, 80, BF16, "elu1", segments=True),
    Case(1, 66, 1, 136, 72, BF16, "elu1"),
    Case(1, 66, 1, 80, 160, BF16, "relu"),
    Case(1, 66, 2, 77, 19, BF16, "elu1", segments=True),  # padded
    Case(2, 40, 1, 17, 64, BF16, "none", packed=True),
)
LARGE = tuple(
    Case(2, length, 3, K, V, BF16, ("elu1", "relu", "none")[i % 3], segments=i % 4 < 2, packed=i % 5 == 0)
    for i, (length, (K, V)) in enumerate(
        (length, widths) for length in (1, 64, 127, 333, 1000) for widths in ((64, 64), (64, 128), (128, 64), (128, 128))
    )
) + tuple(
    Case(2, length, 3, K, V, BF16, ("elu1", "relu", "none")[i % 3], segments=i % 4 < 2, packed=i % 5 == 0)
    for i, (length, (K, V)) in enumerate(
        (length, widths)
        for length in (127, 333)
        for widths in ((40, 72), (112, 96), (160, 80), (96, 256), (256, 192), (81, 47), (19, 78), (129, 255), (191, 71))
    )
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("device", None) == "cuda"
        metafunc.parametrize("case", SMALL + LARGE if on_gpu else SMALL, ids=str)


def test_values_and_gradients(case: Case, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table, "OWN", math.inf)
    monkeypatch.setattr(table, "SHORTEST", 64)
    monkeypatch.setattr(table, "FEW", 1 << 20)
    monkeypatch.setattr(
        table, "HOPPER", {key: dataclasses.replace(cut, programs=1 << 20 if case.segments else 1) for key, cut in table.HOPPER.items()}
    )
    given = inputs(case, device)
    leaves = [given[name].detach().requires_grad_() for name in ("q", "k", "v", "S", "z")]
    q, k, v, S, z = leaves
    monkeypatch.setattr(table, "LARGE", 0)
    exactly = case.K % table.COPIED == case.V % table.COPIED == 0
    assert operator.on_hopper({"q": q, "k": k, "v": v}, case.feature_map, False) == exactly
    assert padded.served(q, v, case.feature_map, False) != exactly
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    try:
        o, ends = linear_attention(q, k, v, (S, z), None, None, case.feature_map)
        gradients = torch.autograd.grad([o, *ends], leaves, [given["do"], given["dS"], given["dz"]])
        if device == "cuda":
            o2, ends2 = linear_attention(q, k, v, (S, z), None, None, case.feature_map)
            again = torch.autograd.grad([o2, *ends2], leaves, [given["do"], given["dS"], given["dz"]])
            assert all(torch.equal(a, b) for a, b in zip((o, *gradients), (o2, *again), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    exact, terms = written_out(case, given), written_out(case, given, -1.0)
    for name, a in zip(NAMES, (o, *ends, *gradients), strict=False):
        judge.within(a.detach().double().cpu(), exact[name].cpu(), budget(case, name, terms[name]).cpu(), name)


def test_what_it_does_not_serve(device: str):
    q = torch.zeros(1, 3, 1, 64, dtype=BF16, device=device)
    assert operator.on_hopper({"q": q, "k": q, "v": q}, "elu1", False)
    assert not operator.on_hopper({"q": q, "k": q, "v": q}, "learned", False)
    assert not operator.on_hopper({"q": q, "k": q, "v": q}, "elu1", True)
    assert not operator.on_hopper({"q": q.float(), "k": q.float(), "v": q.float()}, "elu1", False)
    narrow = q[..., :32]
    assert not operator.on_hopper({"q": narrow, "k": narrow, "v": q}, "elu1", False)
    moved = torch.zeros(200, dtype=BF16, device=device)[1:193].reshape(1, 3, 1, 64)
    assert not operator.on_hopper({"q": q, "k": moved, "v": q}, "elu1", False)
