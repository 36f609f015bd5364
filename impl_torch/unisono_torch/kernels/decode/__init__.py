"""One token of few sequences, in few launches: norm, product and activation in one, and the step of an op in place."""
