"""The stages of `calmix compress`: from a model to a smaller one and its report card."""
