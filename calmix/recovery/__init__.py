"""Recovery: distil the dense model into the remaining weights; pruned weights stay zero."""
