"""One-shot pruning: patterns, statistics, methods, the engine, and the pruned checkpoint."""

from calmix.pruning.allocation import allocate
from calmix.pruning.engine import prune
from calmix.pruning.methods import Method, get_method, register
from calmix.pruning.patterns import (
    Pattern,
    SemiStructured,
    Unstructured,
    as_pattern,
)
from calmix.pruning.report import PruneReport

__all__ = [
    "Method",
    "Pattern",
    "PruneReport",
    "SemiStructured",
    "Unstructured",
    "allocate",
    "as_pattern",
    "get_method",
    "prune",
    "register",
]
