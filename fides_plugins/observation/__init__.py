"""What an operator sees: one vocabulary of metrics, and the alarm over a sequence of verdicts."""
