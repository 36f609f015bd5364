"""S4D's recurrence as Triton kernels: one sweep forward, one back, complex states in registers."""

from unisono_torch.kernels.diagonal_ssm.operator import diagonal_ssm

__all__ = ["diagonal_ssm"]
