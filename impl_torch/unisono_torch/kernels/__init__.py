"""Triton kernels, one folder an op. Importing this package needs neither Triton nor a GPU; the kernels are read when first called."""
