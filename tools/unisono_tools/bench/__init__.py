"""`unisono bench`: kernels beside their peers, as shares of what the hardware was measured to allow in the same run."""
