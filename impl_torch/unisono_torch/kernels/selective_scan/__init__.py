"""The selective scan as Triton kernels: one sweep forward, one back, softplus, D-skip and gate in them."""

from unisono_torch.kernels.selective_scan.operator import selective_scan

__all__ = ["selective_scan"]
