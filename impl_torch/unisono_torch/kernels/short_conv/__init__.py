"""The short convolution as Triton kernels: one pass forward, one back."""

from unisono_torch.kernels.short_conv.operator import short_conv

__all__ = ["short_conv"]
