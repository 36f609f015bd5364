"""What is asked of models beside training them: sizes that match, baselines by counts, comparisons, dependencies, and their pictures."""
