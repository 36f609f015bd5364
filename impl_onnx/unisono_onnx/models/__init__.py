"""The wiring of each architecture: `read` takes a Builder and the state before, and gives logits and the state after."""
