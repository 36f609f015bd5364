"""Models train as one graph, forward and backward, with the kernels inside it, and as they do without a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import unisono_torch
from torch import Tensor
from unisono_conformance import numerics
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.lat import LATConfig
from unisono_torch.ops import linear_cross_entropy, mapped_attention, multiscale
from unisono_torch.ops.dispatch import use_triton

VOCABULARY = 11
LAT = LATConfig(d_model=4, n_layers=1, vocab_size=VOCABULARY, head_width=4, qk_width=4, positions="rope")
MODELS = {
    "lat": (LAT, "linear_attention"),
    "based": (
        LAT.replace(n_layers=3, attention=("conv", "linear", "window"), window=3, positions="none", tie_head=True),
        "linear_attention",
    ),
    "infinityformer": (
        InfinityFormerConfig(d_model=4, n_layers=1, n_heads=1, d_ffn=4, vocab_size=VOCABULARY, n_scales=1),
        "turned_multiscale",
    ),
}


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch):
    """Where "auto" takes kernels on a GPU, it takes them in the interpreter."""

    def taken(implementation: str, *arguments: Any, **settings: Any) -> bool:
        return use_triton("triton" if implementation == "auto" else implementation, *arguments, **settings)

    for op in (mapped_attention, multiscale):
        monkeypatch.setattr(op, "use_triton", taken)
    monkeypatch.setattr(linear_cross_entropy, "_serves", lambda x, weight: True)
    torch.compiler.reset()


def _not_while_compiling(function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        assert not torch.compiler.is_compiling(), function
        return function(*arguments)

    return call


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_one_graph(name: str, device: str, monkeypatch: pytest.MonkeyPatch):
    config, op = MODELS[name]
    # torch 2.11 cannot trace it
    monkeypatch.setattr(torch.amp, "is_autocast_available", _not_while_compiling(torch.amp.is_autocast_available))
    model: Any = unisono_torch.create(config, seed=1, device=device)
    found: set[str] = set()

    def loss(tokens: Tensor) -> Tensor:
        return model.nats(tokens[:, :-1], tokens[:, 1:])[0]

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # pyright: ignore[reportPrivateUsage]

    compiled: Any = torch.compile(loss, fullgraph=True, backend=backend)
    weights = [p for p in model.parameters() if p.requires_grad]
    tokens = torch.randint(0, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(0)).to(device)
    value, exact = compiled(tokens), loss(tokens)
    torch.testing.assert_close(value, exact, rtol=numerics.formula("float32", 20), atol=0)
    # of the whole gradient: the part of one parameter may be what is left of terms that cancel
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(v, weights)]) for v in (value, exact))
    assert float((a - b).norm()) <= numerics.formula("float32", 20, gradient=True) * float(b.norm())
    assert all(any(f"unisono.{name}" in target for target in found) for name in (op, "linear_cross_entropy")), found
