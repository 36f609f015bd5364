"""Products whose rows lie in memory padded, as a GPU's of 50,257 ids do: nobody sees it but by the strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from unisono_conformance import judge, numerics
from unisono_spec.contract.lat import LATConfig
from unisono_torch import create
from unisono_torch.ops import elementwise

TOKENS = torch.arange(2 * 9).reshape(2, 9) % 13


def trained(tied: bool, dtype: str, device: str, cast: bool = False, compiled: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and what a cross-entropy sends to each parameter."""
    config = LATConfig(d_model=8, n_layers=1, vocab_size=13, head_width=4, qk_width=4, tie_head=tied, head_bias=not tied)
    model = create(config, seed=4, dtype=dtype, param_dtype="float64" if dtype == "float64" else "float32", device=device)
    tokens = TOKENS.to(device)

    def loss() -> tuple[Tensor, Tensor]:
        logits = model(tokens[:, :-1])[0]
        wide = logits.double() if dtype == "float64" else logits.float()
        return F.cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten()), logits

    with torch.autocast(device, torch.bfloat16, enabled=cast):
        found, logits = (torch.compile(loss, fullgraph=True) if compiled else loss)()
    found.backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, slopes = trained(tied, "float64", "cpu")
    monkeypatch.setattr(elementwise, "_unaligned", lambda x, weight: True)
    padded, same = trained(tied, "float64", "cpu")
    assert padded.stride(-2) == elementwise.ALIGNED
    assert logits.stride(-2) == logits.shape[-1]
    judge.same([padded.detach(), same], [logits.detach(), slopes])


def test_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what torch.func derives, twice."""
    made = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=made, dtype=torch.float64) for shape in ((3, 2, 4), (5, 4), (5,)))

    def curvature(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.func.grad(lambda w: torch.func.grad(lambda x: elementwise.linear(x, w, b).sin().sum())(x).square().sum())(w)

    def each() -> Tensor:
        return torch.func.vmap(curvature, in_dims=(0, None, None))(x, w, b)

    plain = each()
    monkeypatch.setattr(elementwise, "_unaligned", lambda x, weight: True)
    judge.same(each(), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("how", ["bfloat16", "cast", "compiled"])
def test_on_a_gpu(how: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit rows are padded there and nowhere else, under autocast and in compiled code as well; the numbers are as near as ever."""
    monkeypatch.setattr(elementwise, "FEWEST", 1)
    dtype = "float32" if how == "cast" else "bfloat16"
    logits, slopes = trained(True, dtype, device, how == "cast", how == "compiled" and device == "cuda")
    if how != "compiled":  # a compiler lays out what it hands back as it likes
        assert logits.stride(-2) == (elementwise.ALIGNED if device == "cuda" else logits.shape[-1])
    assert logits.dtype == torch.bfloat16
    true, true_slopes = trained(True, "float64", "cpu")
    for found, wanted in ((logits, true), *((slopes[name], slope) for name, slope in true_slopes.items())):
        size = wanted.abs().max()  # sums of 16 products, some through three layers
        judge.same((found.detach().double().cpu() / size), (wanted.detach() / size), limit=numerics.rounding("bfloat16", 2**4))
