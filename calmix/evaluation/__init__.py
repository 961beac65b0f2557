"""What a model can do: text scored by likelihood, suites of tasks, retention."""
