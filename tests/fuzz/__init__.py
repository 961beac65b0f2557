"""Mutated input files: every reader reads them, or refuses them in one line."""
