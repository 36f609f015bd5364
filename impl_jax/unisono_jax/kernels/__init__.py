"""Kernels in Pallas, one module an op. They are compiled by JAX's Triton backend, which JAX calls deprecated: ops do without it."""
