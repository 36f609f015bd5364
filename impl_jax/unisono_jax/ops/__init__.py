"""Pure functions of arrays, each in its recurrent and its parallel form, which share no code (but for MoM-GRU, sequential in both)."""
