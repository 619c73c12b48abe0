"""Learning from the call log: grading answers, ranking models, nightly review."""
