"""Evaluation of models: likelihood of text, suites of tasks, retention."""
