"""The choice of the next id by kernels, and in PyTorch's operations, against the contract: ids, near-ties, trouble."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unisono_spec.contract import InputError
from unisono_spec.contract import sampling as contract
from unisono_spec.contract.sampling import GREEDY, Sampling, choose, trouble, uniform
from unisono_torch.decoding import sampling
from unisono_torch.kernels.decode import counts
from unisono_torch.kernels.decode.choose import choose as kernel
from unisono_torch.kernels.decode.draw import draw

WARM = Sampling(1.5, top_k=9000, seed=7)  # more than there are keeps all


def logits_of(kind: str) -> np.ndarray:
    z = 3 * np.random.default_rng(5).standard_normal((4, 3000))
    if kind == "ties":
        z[:, 100] = z[:, 2900] = z.max(-1)
        z[1, 7] = z[1].max() * (1 + 1e-7)
        z[3, [8, 9]] = z[3].max() + 1  # both of one block
    if kind == "infinite":
        z[:, 1::2] = -np.inf
        z[0], z[0, 5] = -np.inf, -1  # a single one, which is no greater than 0
        z[2, [4, 2500]], z[3, 6] = np.inf, np.inf
    return z.astype(np.float32)


@pytest.mark.parametrize("kind", ["plain", "ties", "infinite"])
@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16])
def test_choices_are_those_of_the_contract(kind: str, narrow: torch.dtype | None, device: str) -> None:
    logits = torch.from_numpy(np.repeat(logits_of(kind), 2, 0)).to(device, narrow)[::2]
    host = logits.float().cpu().numpy()
    number = torch.tensor(1, device=device)
    ids, ties, bad = (torch.full((3, 4), 9, dtype=kind, device=device) for kind in (torch.int64, torch.bool, torch.int32))
    token = torch.zeros(4, dtype=torch.int64, device=device)
    kernel(logits, number, ids, ties, bad, token)
    for found in ((ids[1], ties[1], bad[1]), sampling.greedy(logits)):
        for a, b in zip(found, (*choose(host, GREEDY, 0), np.zeros(4)), strict=True):
            assert np.array_equal(a.cpu(), b)
    assert np.array_equal(token.cpu(), ids[1].cpu())
    assert (ids[::2] == 9).all()
    held = counts.Counts(4, logits.device)
    laws = WARM, Sampling(1.0, 5, 0.5, 11), Sampling(0.5, top_k=40, seed=3), Sampling(2.0, top_p=0.6), Sampling(3e-308)
    for law in laws if narrow is None else laws[:2]:
        u = torch.from_numpy(uniform(law.seed, 4, 12, 1))[0].to(device)
        temperature, top_p = (torch.tensor(a, dtype=torch.float64, device=device) for a in (law.temperature, law.top_p))
        top_k, uniforms = torch.tensor(law.top_k, device=device), u.repeat(3, 1)
        with np.errstate(over="ignore", invalid="ignore"):  # the interpreter's arithmetic is NumPy's, which tells them
            draw(logits, uniforms, temperature, top_k, top_p, number, ids, ties, bad, token)
        for found in (sampling.drawn(logits, u, temperature, top_k, top_p), (ids[1], ties[1], bad[1])):
            for a, b in zip(found, (*choose(host, law, 12), np.zeros(4)), strict=True):
                assert np.array_equal(a.cpu(), b)
        if narrow is not None:  # by counts, which are 0 again
            for _ in range(2 if law == WARM and narrow == torch.bfloat16 else 1):
                with np.errstate(over="ignore", invalid="ignore"):
                    counts.draw(held, logits, uniforms, temperature, top_k, top_p, number, ids, ties, bad, token)
                for a, b in zip((ids[1], ties[1], bad[1]), (*choose(host, law, 12), np.zeros(4)), strict=True):
                    assert np.array_equal(a.cpu(), b)
    assert torch.equal(token, ids[1])


BESIDE = [False, True, True, False]


@pytest.mark.parametrize(("where", "near"), [("within", BESIDE), ("cut", BESIDE), ("end", [False] * 4), ("equal", [True] * 4)])
def test_draws_beside_an_edge(where: str, near: list[bool], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CDF: ties where u is less than NEAR_TIE away from it, on either side; or where it lies between u's shares of the least and
    the most that a top_p may keep, which ends near an edge itself. The end is no edge, wherever ids follow that have no probability; and
    of equals, u at an edge chooses what follows it."""
    z = logits_of("plain")[:1].repeat(4, 0)
    if where == "end":
        z[:, 6:] = -np.inf
    p = np.exp(np.sort(z[0].astype(np.float64))[::-1] - z[0].max())
    edges, beside = np.cumsum(p / p.sum()), np.array([-1.5, -0.5, 0.5, 1.5])
    u, law = edges[26] + beside * contract.NEAR_TIE, Sampling(1.0)
    if where == "cut":
        ends = edges[2] / edges[[5, 4]]
        u, law = ends.mean() + beside * (ends[1] - ends[0]) / 2, Sampling(1.0, top_p=float(edges[4] + contract.NEAR_TIE / 2))
    if where == "equal":
        z, u = 0 * z[:, :8], np.arange(4) / 4
    if where == "end":
        u = 1 - np.arange(1, 5) * contract.NEAR_TIE / 3
    monkeypatch.setattr(contract, "_uniform", lambda seed, row, number: u[row])
    true = choose(z, law, 0)
    assert true[1].tolist() == near
    logits, uniforms = torch.from_numpy(z).to(device), torch.from_numpy(u)[None].to(device)
    temperature, top_p = (torch.tensor(a, dtype=torch.float64, device=device) for a in (law.temperature, law.top_p))
    top_k = number = torch.tensor(0, device=device)
    ids, ties, bad = (torch.zeros((1, 4), dtype=kind, device=device) for kind in (torch.int64, torch.bool, torch.int32))
    draw(logits, uniforms, temperature, top_k, top_p, number, ids, ties, bad, torch.zeros(4, dtype=torch.int64, device=device))
    for found in ((ids[0], ties[0]), sampling.drawn(logits, uniforms[0], temperature, top_k, top_p)[:2]):
        assert all(np.array_equal(a.cpu(), b) for a, b in zip(found, true, strict=True))


def test_a_penalty_lowers_what_is_below_0() -> None:
    z, seen = np.array([[-1.0, -1.5, -9]]), np.array([[True, False, False]])
    moved, _ = sampling.penalised(torch.from_numpy(z), torch.from_numpy(seen), torch.tensor(2.0, dtype=torch.float64))
    true, _ = choose(z, Sampling(0, repetition_penalty=2), 0, seen)
    assert np.array_equal(sampling.greedy(moved)[0], true)


def test_trouble_is_told() -> None:
    z = torch.zeros(3, 5)
    z[0, 3], z[1] = torch.nan, -torch.inf
    assert sampling.greedy(z)[2].tolist() == [1, 2, 0]
    for row, kind in ((z[:1], 1), (z[1:2], 2)):
        with pytest.raises(InputError) as error:
            choose(row.numpy(), GREEDY, 4)
        assert str(error.value) == trouble(kind, 4)


def test_trouble_is_counted(device: str) -> None:
    """A NaN of either sign, and −inf alone; and counts are 0 after them."""
    z = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    z[0, 3], z[1, 4], z[2] = torch.nan, -torch.tensor(torch.nan), -torch.inf
    one, none = (torch.tensor(value, dtype=torch.float64, device=device) for value in (1, 0))
    (ids, ties, bad), token = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((3, 1, 4), (4,)))
    held = counts.Counts(4, z.device)
    with np.errstate(over="ignore", invalid="ignore"):
        counts.draw(
            held, z, torch.zeros((1, 4), dtype=torch.float64, device=device), one, none.long(), one, none.long(), ids, ties, bad, token
        )
    assert bad[0].tolist() == [1, 1, 2, 0]
    assert not held.counts.any()
    assert (held.best == counts.NUMBERS.value).all()
