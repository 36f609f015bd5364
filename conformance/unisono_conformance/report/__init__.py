"""What is said: what was tried and how close it came, known gaps, the report."""
