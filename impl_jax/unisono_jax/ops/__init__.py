"""Pure functions of arrays, each in its recurrent and its parallel form, which share no mathematics (but for MoM-GRU, which has no parallel form)."""
