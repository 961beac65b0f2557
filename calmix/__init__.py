"""Compress language models with mixed calibration sets and measure which abilities survive.

The public API. Names are imported on first use, so `import calmix` stays light.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

# cuBLAS reads this at start-up; without it, the summation order of a product can vary.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A warning of tqdm in notebooks without ipywidgets.
warnings.filterwarnings("ignore", message="IProgress not found")

if TYPE_CHECKING:
    __version__: str
    from calmix import sources as sources
    from calmix.calibration.dataset import CalibrationSet as CalibrationSet
    from calmix.calibration.request import calibration_set as calibration_set
    from calmix.compression.compress import compress as compress
    from calmix.deploy.pack import load as load
    from calmix.deploy.pack import pack as pack
    from calmix.deploy.pack import unpack as unpack
    from calmix.errors import CalmixError as CalmixError
    from calmix.evaluating import evaluate as evaluate
    from calmix.evaluation.scores import CapabilityScores as CapabilityScores
    from calmix.models.opening import open_model as open_model
    from calmix.progress import Progress as Progress
    from calmix.pruning.engine import prune as prune
    from calmix.pruning.patterns import SemiStructured as SemiStructured
    from calmix.pruning.patterns import Unstructured as Unstructured
    from calmix.pruning.requests import recover_request as recover_request
    from calmix.recovery.checkpoint import recover as recover

_NAMES = {
    "calibration.dataset": ("CalibrationSet",),
    "calibration.request": ("calibration_set",),
    "compression.compress": ("compress",),
    "deploy.pack": ("load", "pack", "unpack"),
    "errors": ("CalmixError",),
    "evaluating": ("evaluate",),
    "evaluation.scores": ("CapabilityScores",),
    "models.opening": ("open_model",),
    "progress": ("Progress",),
    "pruning.engine": ("prune",),
    "pruning.patterns": ("SemiStructured", "Unstructured"),
    "recovery.checkpoint": ("recover",),
    "pruning.requests": ("recover_request",),
}
_HOMES = {name: f"calmix.{home}" for home, names in _NAMES.items() for name in names}
__all__ = ["sources", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("calmix")
    if name == "sources":
        return importlib.import_module("calmix.sources")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'calmix' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
