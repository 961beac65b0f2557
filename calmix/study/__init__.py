"""Studies: a grid of trials from one file, run locally or on a cluster, and kept in a store."""
