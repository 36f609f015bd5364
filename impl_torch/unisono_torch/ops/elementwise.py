"""Functions without memory, and the dtype that sums are held in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.kernels.registry import available
from unisono_torch.ops.transforms import transformed

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6
SHRINK = 2.0**-40  # of rows that may be so large that float32 does not hold their squares; with ε shrunk alike a norm stays what it is
ALIGNED = 64  # numbers that padded rows of a product are a multiple of
FAR = 100.0  # where GELU is its limit, x or 0, to the last digit: beyond, its slope times the cube of x is 0 times infinity
FEWEST = 1024  # rows of x, and of the weights, for which that is worth a copy of these: narrow products are faster as they are


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, scores, sums and states under compute dtype `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


Function = Callable[[Tensor], Tensor]


class _Smooth(torch.autograd.Function):
    """value(x), whose derivative keeps its digits."""

    @staticmethod
    def forward(x: Tensor, value: Function, slope: Function, back: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, _, ctx.slope, ctx.back = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        y, dy = x.to(wide(x.dtype)), dy.to(wide(x.dtype))
        dx = dy * ctx.slope(y) if torch.is_grad_enabled() else ctx.back(dy, y)
        return dx.to(x.dtype), None, None, None


class _Fused(torch.autograd.Function):
    """GELU on a GPU, by a kernel each way."""

    @staticmethod
    def forward(x: Tensor, tanh: bool, slope: Function) -> Tensor:
        from unisono_torch.kernels.gelu import forward

        return forward(x, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.tanh, ctx.slope = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from unisono_torch.kernels.gelu import backward

        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated in its turn
            return (dy.to(wide(x.dtype)) * ctx.slope(x.to(wide(x.dtype)))).to(x.dtype), None, None
        return backward(dy, x, ctx.tanh), None, None


def on_a_gpu(x: Tensor) -> bool:
    """Whether a kernel may take x: on a GPU, in float32 or narrower, where operations are not transformed."""
    return x.device.type == "cuda" and x.dtype != torch.float64 and not transformed() and available(x.device)


def _fuses(x: Tensor) -> bool:
    """... and not compiled: a compiler fuses plain operations as well."""
    return not torch.compiler.is_compiling() and on_a_gpu(x)


def _smooth(x: Tensor, value: Function, plain: Function, slope: Function, back: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A function by four: plain, by operations whose own derivatives keep their digits, for a compiler and torch.func; value, as fast as
    can be; slope, its derivative by functions of this file; back, dy and x → dy slope(x), as fast as can be."""
    if not torch.is_grad_enabled():
        return value(x)
    if torch.compiler.is_compiling() or transformed():
        return plain(x)
    return _Smooth.apply(x, value, slope, back)  # pyright: ignore[reportReturnType]


def _fading(x: Tensor) -> Tensor:
    """e^−|x|, whose derivative at 0 is that from the right."""
    return torch.where(x >= 0, -x, x).exp()


def sigmoid(x: Tensor) -> Tensor:
    """[...] → [...]: the logistic function σ. Its slope is σ(x) σ(−x), to its last digits however small: torch's y(1−y) has none where
    y is nearly 1."""

    def plain(x: Tensor) -> Tensor:
        e = _fading(x)
        return torch.where(x >= 0, 1, e) / (1 + e)

    return _smooth(x, torch.sigmoid, plain, lambda x: sigmoid(x) * sigmoid(-x), _sigmoid_back)


def _sigmoid_back(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(dy, x.abs().neg_().sigmoid_())  # y(1−y) of σ(−|x|), which is far from 1


def tanh(x: Tensor) -> Tensor:
    """[...] → [...]: tanh x. Its slope is 4 σ(2x) σ(−2x); torch's 1−y² has no digits where y is nearly 1."""

    def plain(x: Tensor) -> Tensor:
        return torch.where(x.abs() < 1, torch.tanh(x), 2 * sigmoid(2 * x) - 1)

    return _smooth(x, torch.tanh, plain, lambda x: 4 * sigmoid(2 * x) * sigmoid(-2 * x), lambda dy, x: _sigmoid_back(dy, 2 * x).mul_(4))


def gelu_tanh(x: Tensor) -> Tensor:
    """[...] → [...]: GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), rounded once to the dtype of x.

    ½(1 + tanh u) is σ(2u), which keeps the digits of its tail: F.gelu's sum has none below −5, nor has its slope.
    """
    c, d = (8 / math.pi) ** 0.5, (8 / math.pi) ** 0.5 * 0.044715  # 2u = x (c + d x²)

    def slope(x: Tensor) -> Tensor:
        x = x.clamp(-FAR, FAR)
        z = x * (c + d * (x * x))
        return sigmoid(z) * (1 + x * (c + 3 * d * (x * x)) * sigmoid(-z))

    def back(dy: Tensor, x: Tensor) -> Tensor:
        x = x.clamp(-FAR, FAR)
        square = x * x
        z = (square * d).add_(c).mul_(x)
        y = torch.sigmoid(z)
        return square.mul_(3 * d).add_(c).mul_(x).mul_(z.neg_().sigmoid_()).add_(1).mul_(y).mul_(dy)

    def value(x: Tensor) -> Tensor:
        y = x.to(wide(x.dtype))
        return (y * y).mul_(d).add_(c).mul_(y).sigmoid_().mul_(y).to(x.dtype)

    def plain(x: Tensor) -> Tensor:
        y = x.to(wide(x.dtype))
        near = y.clamp(-FAR, FAR)
        return (y * sigmoid(near * (c + d * (near * near)))).to(x.dtype)

    return _Fused.apply(x, True, slope) if _fuses(x) else _smooth(x, value, plain, slope, back)  # pyright: ignore[reportReturnType]


def gelu(x: Tensor) -> Tensor:
    """[...] → [...]: GELU, exact: x Φ(x) (Hendrycks & Gimpel 2016, section 2), rounded once to the dtype of x.

    Φ(x) is ½ erfc(−x/√2), which keeps the digits of its tail: F.gelu's ½(1 + erf) has none below −5, nor has its slope.
    """
    root, density = 0.5**0.5, (2 * math.pi) ** -0.5

    def slope(x: Tensor) -> Tensor:
        return 0.5 * torch.special.erfc(-root * x) + x * (density * (-0.5 * (x * x)).exp())

    def back(dy: Tensor, x: Tensor) -> Tensor:
        bell = (x * x).mul_(-0.5).exp_().mul_(x).mul_(density)
        return bell.add_((x * -root).erfc_(), alpha=0.5).mul_(dy)

    def value(x: Tensor) -> Tensor:
        y = x.to(wide(x.dtype))
        return (y * -root).erfc_().mul_(y).mul_(0.5).to(x.dtype)

    def plain(x: Tensor) -> Tensor:
        y = x.to(wide(x.dtype))
        return (0.5 * y * torch.special.erfc(-root * y)).to(x.dtype)

    return _Fused.apply(x, False, slope) if _fuses(x) else _smooth(x, value, plain, slope, back)  # pyright: ignore[reportReturnType]


def gated_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """[a, b] [..., 2F], and bias [2F] of both → [..., F]: GELU(a ∘ σ(b)), exact GELU. On a GPU one kernel each way, compiled or not: a
    compiler makes a result so wide twice rather than to keep it, and reads its gradient once more to sum for a bias."""
    if x.shape[-1] % 2:
        raise InputError(f"x: {x.shape[-1]} entries, expected an even number: as many gates as values")
    if on_a_gpu(x):
        from unisono_torch.kernels.gelu import gated

        return gated(x, bias)
    a, b = (x if bias is None else x + bias.to(x.dtype)).chunk(2, -1)
    return gelu(a * sigmoid(b))


def silu(x: Tensor) -> Tensor:
    """[...] → [...]: x σ(x)."""
    # torch's first derivative keeps its digits, its second does not
    return _smooth(x, F.silu, lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * sigmoid(-x)), torch.ops.aten.silu_backward)


def softplus(x: Tensor) -> Tensor:
    """[...] → [...]: log(1 + e^x) at every x; F.softplus would give x itself above a threshold."""

    def plain(x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, 0) + torch.log1p(_fading(x))

    return _smooth(x, lambda x: F.logsigmoid(-x).neg(), plain, sigmoid, lambda dy, x: torch.sigmoid(x).mul_(dy))


def log_sigmoid(x: Tensor) -> Tensor:
    """[...] → [...]: log σ(x), finite for every x."""
    return -softplus(-x)


def rms_norm(x: Tensor, weight: Tensor, eps: float = RMS_NORM_EPS) -> Tensor:
    """x [..., D] → [..., D]: RMSNorm, ε = 1e-6 unless told (Zhang & Sennrich 2019, eq 4), computed and returned in float32 or wider; right
    up to entries of 10¹⁸, whose squares float32 holds, and its gradient up to 10¹², of which it holds the cubes."""
    dtype = wide(x.dtype)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, large: bool = False) -> Tensor:
    """x [..., D] → [..., D]: LayerNorm, ε = 1e-5 (Ba et al. 2016, eq 3), computed and returned in float32 or wider.

    large: right up to entries of 10²⁹, not of 10¹⁸ alone, for an operation more each way.
    """
    dtype = wide(x.dtype)
    x = x.to(dtype)
    # torch's kernels compute x·rstd − mean·rstd, forward and backward: where all of x shares a large part, as the entries of ξ do,
    # the difference has few digits left. Without that part it has all of them.
    x, eps = x - x.mean(-1, keepdim=True), LAYER_NORM_EPS
    if large:
        x, eps = x * SHRINK, eps * SHRINK**2
    return F.layer_norm(x, x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] → [..., out], in x's dtype whatever dtype the parameters are held in.

    On a GPU products of 16-bit numbers whose rows are no multiple of 16 bytes, as logits of GPT-2's 50,257 ids, take several times as
    long: there rows of the result lie in memory padded, and so do those of its gradient. Only its strides tell.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if len(weight) == 1 and torch.compiler.is_compiling():  # which a compiler adds up where it makes x; a product reads and writes it again
        y = (x.to(wide(x.dtype)) * weight[0]).sum(-1, keepdim=True)
        return (y if bias is None else y + bias).to(x.dtype)
    if not _unaligned(x, weight):
        return F.linear(x, weight, bias)
    pad = -len(weight) % ALIGNED
    return F.linear(x, F.pad(weight, (0, 0, 0, pad)), None if bias is None else F.pad(bias, (0, pad)))[..., : len(weight)]


def linear_in_full(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] → [..., out] in float32 or wider, of parameters in all their digits: what stands in an
    exponent, as Mamba's Δ. On a GPU a kernel takes few entries in bfloat16 (kernels/narrow): products in float32 pass over wide results
    several times, and have no tensor cores."""
    if on_a_gpu(x) and x.numel() >= FEWEST * x.shape[-1]:
        from unisono_torch.kernels import narrow

        if narrow.serves(x, weight):
            return narrow.narrow(x, weight, bias)
    return linear(x.to(wide(x.dtype)), weight, bias)


def _unaligned(x: Tensor, weight: Tensor) -> bool:
    """Whether the product's rows are better padded: on a GPU, and where x has rows enough to be worth a copy of the weights."""
    narrow = x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)
    return narrow and len(weight) % 8 != 0 and len(weight) >= FEWEST and x.numel() >= FEWEST * x.shape[-1]


def binary_digits(n: Tensor, digits: int, dtype: torch.dtype) -> Tensor:
    """The last `digits` binary digits of non-negative integers, most significant first: [...] → [..., digits]."""
    shifts = torch.arange(digits - 1, -1, -1, device=n.device)
    # the function and not >>, which does not export to ONNX
    return torch.bitwise_and(torch.bitwise_right_shift(n.long()[..., None], shifts), 1).to(dtype)
