"""The decode step of linear attention before the court, as an op by itself; and steps of models in bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from unisono_conformance import judge, judge_op, numerics
from unisono_spec.contract import Config, init_params
from unisono_spec.contract.mamba import MambaConfig
from unisono_torch import create
from unisono_torch.arrays import numpy_state, to_numpy
from unisono_torch.decoding import Decoder, parts
from unisono_torch.kernels.decode import attention, project, scans, slabs, tiles
from unisono_torch.kernels.decode.project import MOST, Finish, projected
from unisono_torch.kernels.decode.tiles import Next
from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops import rotary

from .together import together

ASKED = ("P15",) if interpreted() else ("P1", "P3", "P9", "P10", "P15", "P16")


def test_linear_attention(device: str) -> None:
    def stepped(q: Tensor, k: Tensor, v: Tensor, initial_state: tuple, reset: Tensor | None = None, valid: Tensor | None = None) -> tuple:
        S, z = (a.to(device, torch.float32, copy=True).contiguous() for a in initial_state)
        batch, heads, out = len(S), S.shape[1], []
        alone = Finish(None, None, batch * heads, S.device)
        for t in range(q.shape[1]):
            if reset is not None:
                cut = reset[:, t].to(device)
                S.masked_fill_(cut[:, None, None, None], 0)
                z.masked_fill_(cut[:, None, None], 0)
            token = [a[:, t].to(device) for a in (q, k, v)]
            if valid is not None:
                token = [torch.where(valid[:, t, None, None].to(device), a, 0) for a in token]
            qkv = torch.cat([a.flatten(1) for a in token], 1)
            o = attention.linear_step(qkv, S, z, q.shape[-1], "none", None, None, alone, None)
            out.append(o.unflatten(1, (heads, -1)).cpu())
        return torch.stack(out, 1), (S.cpu(), z.cpu())

    verdict = judge_op(stepped, "linear_attention", "torch", "recurrent", ("float32",), ASKED)
    assert verdict.holds, verdict.failed


@pytest.mark.parametrize(("norm", "act"), [("rms", "none"), ("layer", "gelu"), ("none", "gelu_tanh"), ("layer", "relu"), ("rms", "swiglu"),
                                           ("layer", "gated_gelu"), ("none", "glu")])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", ["", "slabs", "long", "tiles", "fronts"])
def test_many_sequences_as_few(norm: str, act: str, dtype: torch.dtype, joined: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By matrix products, in a launch and in some, and by kernels that read a row of weights once: the same but for the order of sums.
    long: rows that slabs do not hold."""
    if joined == "long":
        monkeypatch.setattr(slabs, "LONGEST", 8)
        joined = "slabs"
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, weight, second, residual = drawn(MOST + 3, 15)[:, :12], drawn(10, 12) / 4, drawn(10, 12) / 4, drawn(MOST + 3, 10)
    how: dict[str, Any] = {"bias": drawn(10), "act": act, "norm": (norm, drawn(12), drawn(12), 1e-5), "joined": joined}
    if act in ("swiglu", "gated_gelu", "glu"):
        how |= {"second": second, "second_bias": drawn(10)}
    more = drawn(7, 12).float(), drawn(7).float()

    def asked(rows: slice) -> Tensor:
        beside = torch.empty(len(x[rows]), 7, device=device)
        return torch.cat([projected(x[rows], weight, residual=residual[rows], beside=(*more, beside), **how), beside], 1)

    many, few = asked(slice(None)), torch.cat([asked(rows) for rows in (slice(MOST), slice(MOST, None))])
    limit = numerics.rounding("float32", 2**6) + (numerics.rounding("bfloat16", 2**3) if dtype == torch.bfloat16 else 0)
    judge.same(many.double().cpu(), few.double().cpu(), limit)


@pytest.mark.parametrize(("batch", "joined"), [(2, ""), (MOST + 3, ""), (MOST + 3, "slabs"), (MOST + 3, "fronts")])
@pytest.mark.parametrize("size", [1e27, 1e-3])
def test_norms_of_sums(batch: int, joined: str, size: float, device: str) -> None:
    """LayerNorm of numbers up to 10²⁹, as CRAM's sums may be, and of small ones, whose ε counts."""
    generator = torch.Generator().manual_seed(1)
    x, weight, gain, shift = (torch.randn(shape, generator=generator).to(device) for shape in ((batch, 12), (10, 12), (12,), (12,)))
    found = projected(size * x, weight, norm=("layer", gain, shift, 0.0), joined=joined)
    wide = nn.functional.layer_norm((size * x).double(), (12,), gain.double(), shift.double())
    judge.same(found.double().cpu(), (wide @ weight.double().T).cpu(), numerics.rounding("float32", 2**8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_whose_programs_share_sums(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, of as many tiles as are no multiple of theirs, by programs in any order."""
    if interpreted():
        together(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((70, 600), (70,)))
    front = tiles.Front(weight.device, tiles.split_shape(37, 70, 600, weight.element_size())[1])
    for _ in range(2):
        x = torch.randn((37, 600), generator=generator).to(device, dtype)
        true = (x.double() @ weight.double().T + bias.double()).cpu()
        limit = numerics.rounding("float32", 2**8) + (numerics.rounding("bfloat16", 2) if dtype == torch.bfloat16 else 0)
        judge.same(tiles.shared(x, weight, bias, front).double().cpu(), true, limit)
        assert not front.turns.any()


def test_long_rows(device: str) -> None:
    """Of few sequences, and of more, whose products of wide models have them."""
    generator = torch.Generator().manual_seed(1)
    for batch, k, dtype in ((2, 16500, torch.float32), (10, 1500, torch.bfloat16), (40, 1500, torch.bfloat16)):
        x, weight, gain = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((batch, k), (3, k), (k,)))
        found = projected(x, weight, norm=("rms", gain, None, 1e-5), joined="" if batch <= MOST else "fronts")
        wide = nn.functional.rms_norm(x.double(), (k,), gain.double(), 1e-5).to(dtype).double()
        limit = numerics.rounding("float32", 2**8) + (numerics.rounding("bfloat16", 2) if dtype == torch.bfloat16 else 0)
        judge.same(found.double().cpu(), (wide @ weight.double().T).cpu(), limit)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("finishing", [False, True])
@pytest.mark.parametrize("beside_each_other", [False, True])
def test_the_next_norm(norm: str, finishing: bool, beside_each_other: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that several programs make, twice: by a product, and by what finishes in the launch of a gated convolution."""
    if interpreted() and beside_each_other:
        together(monkeypatch)
        monkeypatch.setattr(project, "at_once", lambda: True)
    generator = torch.Generator().manual_seed(1)
    batch, k, n = (37, 40, 70) if interpreted() else (200, 300, 520)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weight, bias, residual, gain, shift = drawn(n, k) / 4, drawn(n), drawn(batch, n) + 3, drawn(n), drawn(n)
    following = Next((norm, gain, shift if norm == "layer" else None, 1e-5 if norm == "rms" else 0.0), batch, gain.device)
    finish = Finish(weight, bias, 0, gain.device, "tiles", following)
    for _ in range(2):
        x = drawn(batch, 2 * k)
        if finishing:
            taps, state = drawn(k, 1, 2), drawn(batch, 1, k)
            o = nn.functional.silu(x[:, :k]) * (state[:, 0] * taps[:, 0, 0] + x[:, k:] * taps[:, 0, 1])
            y = scans.conv_step(x, state, taps, None, finish, residual)
        else:
            o, y = x[:, :k], projected(x[:, :k], weight, bias, residual=residual, following=following, joined="tiles")
        true = (o.double() @ weight.double().T + bias + residual).cpu()
        wide, g, b = true, gain.double().cpu(), shift.double().cpu()
        if norm == "rms":
            wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * g
        else:
            wide = nn.functional.layer_norm(wide, (n,), g, b)
        assert following.rows is not None
        judge.same([y.double().cpu(), following.rows.double().cpu()], [true, wide], numerics.rounding("float32", 2**8))
        assert not following.blocks.any()
        assert not finish.counters.any()


def test_angles_of_any_position(device: str) -> None:
    """Each of its four digits."""
    position = torch.tensor([0, 255, 300, 70_000, 3_000_000, 2**31 - 1], dtype=torch.int32)
    table = torch.from_numpy(rotary.prepare(6))
    found = attention.cos_sin(position.to(device), table.to(device, torch.float32))
    true = rotary.cos_sin(position, 6, dtype=torch.float64)
    judge.same([a.double().cpu() for a in found], list(true), numerics.rounding("float32", 2**4))


NARROW: dict[str, Config] = {"mamba": MambaConfig(d_model=8, n_layers=2, vocab_size=30, d_state=4)}


@pytest.mark.parametrize(("batch", "joined"), [(1, ""), (MOST + 1, ""), (MOST + 1, "slabs"), (MOST + 1, "tiles"), (MOST + 1, "fronts")])
@pytest.mark.parametrize("name", NARROW)
def test_steps_in_bfloat16(name: str, batch: int, joined: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a state so small that several warps hold them: one that stored before another had loaded made texts of Mamba wrong."""
    monkeypatch.setattr(parts, "joined", lambda model, batch: joined)
    config, random = NARROW[name], np.random.default_rng(3)
    initial = init_params(config, seed=3).items()
    params = {n: numerics.representable(p + 0.1 * random.standard_normal(p.shape), "bfloat16") for n, p in initial}
    model = create(config, params, dtype="bfloat16", device=device)
    tokens = torch.from_numpy(random.integers(0, 30, (batch, 3 if interpreted() else 60)))
    with torch.no_grad():
        before = model.init_state(batch, 64)
        decoder = Decoder(model, before, "greedy")
        for key, own in decoder.state.items():
            own.copy_(before[key])
        logits = [decoder.one(token).clone() for token in tokens.to(device).T]
    given = {"tokens": tokens.numpy(), **numpy_state(before)}
    judge.model(config, params, given, (to_numpy(torch.stack(logits, 1)), numpy_state(decoder.state)), "bfloat16")
