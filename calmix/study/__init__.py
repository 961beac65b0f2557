"""Studies: a grid of trials from one file, run here or on a cluster, kept in a store."""
