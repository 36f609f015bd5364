"""Unisono."""
