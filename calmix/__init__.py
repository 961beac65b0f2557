"""Prune language models with mixed calibration sets, and see which abilities survive."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calmix import sources

if TYPE_CHECKING:
    from calmix.calibration import CalibrationSet
    from calmix.information import measure

__all__ = ["CalibrationSet", "measure", "sources"]

# Torch takes a second to import, so what needs it is imported when first asked for.
_LAZY = {"CalibrationSet": "calmix.calibration", "measure": "calmix.information"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'calmix' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
