"""MoM-GRU's time loop as persistent Triton kernels, one each way: all tokens in one launch."""

from unisono_torch.kernels.mom_gru.operator import loop

__all__ = ["loop"]
