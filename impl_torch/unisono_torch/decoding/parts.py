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
    from unisono_torch.kernels.decode.tiles import Front, Next, Norm
    from unisono_torch.kernels.decode.tiles import Parts as Sum
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


FEW = 2  # sequences whose rows of weights are read by kernels of their own; of more, in 16 bits, products are by tensor cores
# The most sequences whose products hold slabs of weights, by the widest model: not slower than others, as measured.
SLABS = {512: 64, 1024: 32, 1 << 30: 0}
# Of more, the widest model that takes tiles which make the next norm, and for how many sequences at most: not slower than others.
# Others' norms are before their products; Mamba's layer is one launch between a library's products.
TILES = {"s4d": (512, 1 << 30), "mamba": (768, 64)}
NARROWEST = 16  # columns of a program of theirs


def joined(model: Model, batch: int) -> str:
    """How products of many sequences are one launch with what comes before and after them, as `projected` takes it; "" where they are a
    library's, or of few sequences: instead of tiles on a GPU, too, that may not hold at once all programs of a row, which wait for each
    other."""
    from unisono_torch.kernels.decode.project import MOST

    width, arch = model.config.d_model, model.config.arch
    halves = model.compute_dtype.itemsize == 2 and arch != "maru"  # whose products are so narrow that rows of few sequences are faster
    if batch <= (FEW if halves else MOST):
        return ""
    if halves and batch <= next(most for widest, most in SLABS.items() if width <= widest):
        return "slabs"
    small = model.device.type == "cuda" and NARROWEST * _multiprocessors(model.device) < width
    widest, most = TILES.get(arch, (0, 0))
    if halves and not small and width <= widest and batch <= most:
        return "tiles"
    return "" if arch == "mamba" and halves else "fronts"


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_norm(model: Any, i: int, name: str) -> nn.Module:
    """Of what layer i makes."""
    return getattr(model.layers[i + 1], name) if i + 1 < len(model.layers) else model.norm


class Parts:
    """What steps of `batch` sequences are made of, in the model's compute dtype."""

    def __init__(self, model: Model, held: Held, batch: int) -> None:
        self.dtype, self.held, self.batch, self.device = model.compute_dtype, held, batch, model.device
        self.joined = joined(model, batch)
        self.nexts: dict[nn.Module, Next] = {}

    def norm(self, norm: nn.Module | None) -> tuple[str, Tensor | None, Tensor | None, float]:
        """As kernels/decode/project.py takes it."""
        if not isinstance(norm, RMSNorm | LayerNorm):
            return "none", None, None, 0.0
        weight = norm.weight.detach()
        return ("rms", weight, None, norm.eps) if isinstance(norm, RMSNorm) else ("layer", weight, norm.bias.detach(), 0.0)

    def normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """`norm` of x [B, D] by itself, in the compute dtype."""
        from unisono_torch.kernels.decode.project import norm_apart

        return norm_apart(x, self.norm(norm), self.dtype)[0]

    def following(self, norm: nn.Module | None) -> Next | None:
        """`norm` where it is taken with what it is a norm of: of many sequences, but where products take norms of what they read."""
        from unisono_torch.kernels.decode.project import MOST
        from unisono_torch.kernels.decode.tiles import Next

        if norm is None or self.batch <= MOST or self.joined == "slabs":
            return None
        self.nexts[norm] = Next(self.norm(norm), self.batch, next(norm.parameters()).device)
        return self.nexts[norm]

    def before(self, norm: nn.Module | None) -> Callable[[Tensor], tuple[Tensor, Norm, Sum | None]]:
        """x → x, `norm` and what x is to become the sum of, or what the norm made of x already and none."""
        from unisono_torch.kernels.decode.project import NO_NORM

        own = self.norm(norm)

        def given(x: Tensor) -> tuple[Tensor, Norm, Sum | None]:
            made = None if norm is None else self.nexts.get(norm)
            if made is None or made.rows is None:
                return x, own, None if made is None else made.parts
            return made.rows, NO_NORM, None

        return given

    def front(self, weight: Tensor) -> Front | None:
        """What a product waits for that is of the form "fronts", as are those of slabs whose rows are too long for these."""
        from unisono_torch.kernels.decode import tiles

        return tiles.front(self.batch, weight) if self.joined in ("fronts", "slabs") else None

    def linear(
        self,
        layer: Linear | Any,
        norm: nn.Module | None = None,
        act: str = "none",
        weight: Tensor | None = None,
        conv: Any = None,
        following: nn.Module | None = None,
        joined: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Callable[..., Tensor]:
        """x [B, in] and perhaps a residual → [B, out]. With "gated_gelu" and "glu", the two halves of the rows are the two products.
        beside: another product of the same norm. following: the norm that is next. joined: where others are. dtype: of the weight and
        the result, if not the compute dtype."""
        from unisono_torch.kernels.decode.project import MOST, projected

        before = self.before(norm)
        w = self.held.cast(layer.weight if weight is None else weight, dtype or self.dtype)
        b = None if layer.bias is None else layer.bias.detach()
        if b is not None and (self.joined or self.batch > MOST):
            b = self.held.cast(b, w.dtype)  # as a library takes it
        if act in ("gated_gelu", "glu"):
            (w, w2), (b, b2) = w.chunk(2), (None, None) if b is None else b.chunk(2)
        else:
            w2 = b2 = None
        how: dict[str, Any] = {"second": w2, "second_bias": b2, "act": act, "conv": conv, "following": self.following(following)}
        how |= {"joined": self.joined if joined or not self.joined else "library", "front": self.front(w)}

        def product(x: Tensor, residual: Tensor | None = None, beside: Any = None) -> Tensor:
            x, norm, parts = before(x)
            return projected(x, w, b, norm=norm, residual=residual, beside=beside, parts=parts, **how)

        return product

    def finish(
        self,
        layer: Linear | Any,
        owners: int,
        alone: bool = False,
        following: nn.Module | None = None,
        dtype: torch.dtype | None = None,
    ) -> Finish:
        """`linear` in the launch before it, of which `owners` pieces have programs that take turns. alone: without it."""
        from unisono_torch.kernels.decode.project import Finish

        device = layer.weight.device
        if alone:
            return Finish(None, None, owners, device)
        bias = None if layer.bias is None else layer.bias.detach()
        return Finish(self.held.cast(layer.weight, dtype or self.dtype), bias, owners, device, self.joined, self.following(following))

    def ffn(self, ffn: nn.Module, norm: nn.Module | None, following: nn.Module | None, whole: bool = False) -> Callable[..., Tensor]:
        """x [B, D] and what the result is added to → [B, D], of which `following` is a norm. whole: in one launch, of few sequences."""
        from unisono_torch.kernels.decode.project import projected

        kinds = {GELUFFN: "gelu", FFN: "gelu_tanh", GatedGELU: "gated_gelu", SwiGLU: "swiglu"}
        if whole:
            return self._whole_ffn(ffn, norm, kinds[type(ffn)])
        if isinstance(ffn, SwiGLU):
            before, (gate, up, *bias) = self.before(norm), self._two(ffn)
            how: dict[str, Any] = {"second": up, "second_bias": bias[1], "act": "swiglu", "joined": self.joined, "front": self.front(up)}

            def rise(x: Tensor) -> Tensor:
                x, norm, parts = before(x)
                return projected(x, gate, bias[0], norm=norm, parts=parts, **how)
        else:
            rise = self.linear(ffn.up, norm, kinds[type(ffn)])
        down = self.linear(ffn.down, following=following)
        return lambda x, residual: down(rise(x), residual)

    def _two(self, ffn: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A gate and what it lets through, and their biases."""
        gate, up = (self.held.cast(a.weight, self.dtype) for a in (ffn.gate, ffn.up))
        first, second = (None if a.bias is None else a.bias.detach() for a in (ffn.gate, ffn.up))
        return gate, up, first, second

    def _whole_ffn(self, ffn: Any, norm: nn.Module | None, act: str) -> Callable[[Tensor, Tensor], Tensor]:
        from unisono_torch.kernels.decode.pair import paired

        own, finish = self.norm(norm), self.finish(ffn.down, 0)
        if act == "swiglu":
            w, w2, b, b2 = self._two(ffn)
        else:
            w, b, w2, b2 = self.held.cast(ffn.up.weight, self.dtype), None if ffn.up.bias is None else ffn.up.bias.detach(), None, None
        return lambda x, residual: paired(x, w, b, w2, b2, own, act, finish, residual)

    def embedding(self, model: Any) -> Callable[[Tensor], Tensor]:
        weight, dtype = model.embedding.weight.detach(), self.dtype
        return lambda token: nn.functional.embedding(token, weight).to(dtype)

    def head(self, model: Any) -> Callable[[Tensor], Tensor]:
        """x [B, D] → logits [B, V], by matrix products of padded rows where there are many sequences (ops/elementwise.py, `linear`)."""
        from unisono_torch.kernels.decode.project import MOST

        weight = model.embedding.weight if model.config.tie_head else model.head.weight
        size, bias = len(weight), model.head.bias
        if (self.batch <= MOST and not self.joined) or size % 8 == 0:
            return self.linear(model.head, model.norm, weight=weight, joined=False)
        pad = -size % ALIGNED
        padded = SimpleNamespace(
            weight=self.held(lambda: nn.functional.pad(weight.detach().to(self.dtype), (0, 0, 0, pad))),
            bias=None if bias is None else self.held(lambda: nn.functional.pad(bias.detach(), (0, pad))),
        )
        wide = self.linear(padded, model.norm, joined=False)
        return lambda x: wide(x)[:, :size]
