"""One-shot pruning: patterns, Gram matrices, methods, the engine, and the pruned checkpoint."""

from calmix.pruning.engine import PruneReport, prune
from calmix.pruning.methods import METHODS
from calmix.pruning.patterns import Pattern, SemiStructured, Unstructured, parse_pattern

__all__ = [
    "METHODS",
    "Pattern",
    "PruneReport",
    "SemiStructured",
    "Unstructured",
    "parse_pattern",
    "prune",
]
