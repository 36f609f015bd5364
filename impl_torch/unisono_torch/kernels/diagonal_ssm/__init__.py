"""S4D's recurrence on a GPU: matrix products of chunks, or a sweep each way with complex states in registers."""

from unisono_torch.kernels.diagonal_ssm.operator import diagonal_ssm, discretised

__all__ = ["diagonal_ssm", "discretised"]
