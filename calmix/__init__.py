"""Prune language models with mixed calibration sets, and see which abilities survive."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calmix.capability.evaluate import CapabilityScores, evaluate

__all__ = ["CapabilityScores", "evaluate"]

# Looked up when first used, so that `import calmix` stays light.
_HOMES = {
    "CapabilityScores": "calmix.capability.evaluate",
    "evaluate": "calmix.capability.evaluate",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'calmix' has no attribute '{name}'")
