"""Open any decoder-only causal language model; find its decoder blocks by structure."""
