"""Open any decoder-only causal language model; find its decoder blocks by structure."""

from calmix.models.blocks import DecoderBlocks, Prunable, find_blocks
from calmix.models.opening import (
    OpenModel,
    builtin_models,
    check_models,
    open_model,
    resolve_model,
)

__all__ = [
    "DecoderBlocks",
    "OpenModel",
    "Prunable",
    "builtin_models",
    "check_models",
    "find_blocks",
    "open_model",
    "resolve_model",
]
