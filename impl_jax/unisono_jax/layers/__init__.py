"""Projections around an op: Flax NNX modules whose parameter paths, joined by dots, are the contract's names."""
