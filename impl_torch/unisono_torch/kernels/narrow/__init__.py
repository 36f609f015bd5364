"""`unisono::narrow`: x Wᵀ + b of few columns, in float32 of x in bfloat16: Mamba's Δ of its 48 (operator.py)."""

from unisono_torch.kernels.narrow.operator import narrow, serves

__all__ = ["narrow", "serves"]
