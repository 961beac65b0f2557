"""Files of a user or a stranger, mutated: every reader takes them, or refuses them in one line."""
