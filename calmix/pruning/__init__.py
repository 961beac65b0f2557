"""One-shot pruning: patterns, statistics, methods, the engine, and the pruned checkpoint."""
