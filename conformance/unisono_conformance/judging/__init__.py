"""How it is judged: what the spec says, how far off an answer may be, and the comparison."""
