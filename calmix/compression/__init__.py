"""From a model to a smaller one and its report card: the other verbs in a row."""
