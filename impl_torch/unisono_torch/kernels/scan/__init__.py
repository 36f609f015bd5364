"""The linear scan that CRAM's two sums share."""
