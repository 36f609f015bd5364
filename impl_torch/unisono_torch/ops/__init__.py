"""Pure functions of tensors, each in its recurrent and its parallel form; plain tensor operations, and where Triton kernels take over."""
