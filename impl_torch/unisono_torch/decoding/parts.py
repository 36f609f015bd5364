"""What fused steps are made of: what they hold beside the parameters, and products with what comes before and after them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unisono_torch.layers.basic import LayerNorm, Linear, RMSNorm
from unisono_torch.layers.ffn import FFN, GELUFFN, GatedGELU, SwiGLU
from unisono_torch.ops.elementwise import ALIGNED

if TYPE_CHECKING:
    from unisono_torch.kernels.decode.project import Finish
    from unisono_torch.models.base import Model


class Held:
    """Tensors that are functions of parameters: made once, and filled anew by `refresh`, since parameters may have been trained."""

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def __bool__(self) -> bool:
        return bool(self._made)

    def __call__(self, make: Callable[[], Tensor]) -> Tensor:
        found = make().clone()
        self._made.append((found, make))
        return found

    def cast(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """`p` itself where it has the dtype."""
        p = p.detach()
        return p if p.dtype == dtype and p.is_contiguous() else self(lambda: p.to(dtype).contiguous())

    def refresh(self) -> None:
        for held, make in self._made:
            held.copy_(make())


class Parts:
    """What steps of `batch` sequences are made of, in the model's compute dtype."""

    def __init__(self, model: Model, held: Held, batch: int) -> None:
        self.dtype, self.held, self.batch = model.compute_dtype, held, batch

    def norm(self, norm: nn.Module | None) -> tuple[str, Tensor | None, Tensor | None, float]:
        """As kernels/decode/project.py takes it."""
        if norm is None:
            return "none", None, None, 0.0
        assert isinstance(norm, RMSNorm | LayerNorm)
        weight = norm.weight.detach()
        return ("rms", weight, None, norm.eps) if isinstance(norm, RMSNorm) else ("layer", weight, norm.bias.detach(), 0.0)

    def linear(
        self, layer: Linear | Any, norm: nn.Module | None = None, act: str = "none", weight: Tensor | None = None, conv: Any = None
    ) -> Callable[..., Tensor]:
        """x [B, in] and perhaps a residual → [B, out]. With "gated_gelu" and "glu", the two halves of the rows are the two products.
        beside: another product of the same norm."""
        from unisono_torch.kernels.decode.project import projected

        before = self.norm(norm)
        w = self.held.cast(layer.weight if weight is None else weight, self.dtype)
        b = None if layer.bias is None else layer.bias.detach()
        if act in ("gated_gelu", "glu"):
            (w, w2), (b, b2) = w.chunk(2), (None, None) if b is None else b.chunk(2)
        else:
            w2 = b2 = None
        how: dict[str, Any] = {"second": w2, "second_bias": b2, "norm": before, "act": act, "conv": conv}
        return lambda x, residual=None, beside=None: projected(x, w, b, residual=residual, beside=beside, **how)

    def finish(self, layer: Linear | Any, owners: int, alone: bool = False) -> Finish:
        """`linear` in the launch before it, of which `owners` pieces have programs that take turns. alone: without it."""
        from unisono_torch.kernels.decode.project import Finish

        device = layer.weight.device
        if alone:
            return Finish(None, None, owners, device)
        return Finish(self.held.cast(layer.weight, self.dtype), None if layer.bias is None else layer.bias.detach(), owners, device)

    def ffn(self, ffn: nn.Module, norm: nn.Module | None) -> Callable[[Tensor, Tensor], Tensor]:
        """x [B, D] and what the result is added to → [B, D]."""
        from unisono_torch.kernels.decode.project import projected

        if isinstance(ffn, SwiGLU):
            before, gate, up = self.norm(norm), *(self.held.cast(a.weight, self.dtype) for a in (ffn.gate, ffn.up))
            bias = [None if a.bias is None else a.bias.detach() for a in (ffn.gate, ffn.up)]

            def rise(x: Tensor) -> Tensor:
                return projected(x, gate, bias[0], second=up, second_bias=bias[1], norm=before, act="swiglu")
        else:
            kinds = {GELUFFN: "gelu", FFN: "gelu_tanh", GatedGELU: "gated_gelu"}
            rise = self.linear(ffn.up, norm, kinds[type(ffn)])
        down = self.linear(ffn.down)
        return lambda x, residual: down(rise(x), residual)

    def embedding(self, model: Any) -> Callable[[Tensor], Tensor]:
        weight, dtype = model.embedding.weight.detach(), self.dtype
        return lambda token: nn.functional.embedding(token, weight).to(dtype)

    def head(self, model: Any) -> Callable[[Tensor], Tensor]:
        """x [B, D] → logits [B, V], by matrix products of padded rows where there are many sequences (ops/elementwise.py, `linear`)."""
        from unisono_torch.kernels.decode.project import MOST

        weight = model.embedding.weight if model.config.tie_head else model.head.weight
        size, bias = len(weight), model.head.bias
        if self.batch <= MOST or size % 8 == 0:
            return self.linear(model.head, model.norm, weight=weight)
        pad = -size % ALIGNED
        padded = SimpleNamespace(
            weight=self.held(lambda: nn.functional.pad(weight.detach().to(self.dtype), (0, 0, 0, pad))),
            bias=None if bias is None else self.held(lambda: nn.functional.pad(bias.detach(), (0, pad))),
        )
        wide = self.linear(padded, model.norm)
        return lambda x: wide(x)[:, :size]
