"""Prune language models with mixed calibration sets, and see which abilities survive."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calmix import sources
    from calmix.calibration import CalibrationSet
    from calmix.capability.evaluate import CapabilityScores, evaluate
    from calmix.information import measure

__all__ = ["CalibrationSet", "CapabilityScores", "evaluate", "measure", "sources"]

# Looked up when first used, so that `import calmix` stays light.
_HOMES = {
    "CalibrationSet": "calmix.calibration",
    "CapabilityScores": "calmix.capability.evaluate",
    "evaluate": "calmix.capability.evaluate",
    "measure": "calmix.information",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "sources":
        return importlib.import_module("calmix.sources")
    raise AttributeError(f"module 'calmix' has no attribute '{name}'")
