"""Prune language models with mixed calibration sets, and see which abilities survive.

The public API. Names are looked up when first used, so that `import calmix` stays light.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Read when CUDA starts: without it the same product may be summed in another order.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if TYPE_CHECKING:
    from calmix import sources
    from calmix.analysis.predict import predict
    from calmix.calibration import CalibrationSet, resolve
    from calmix.calibration.measuring import measure
    from calmix.deploy.openvino import export
    from calmix.deploy.pack import load, pack, unpack
    from calmix.errors import CalmixError
    from calmix.evaluation.evaluate import evaluate
    from calmix.evaluation.scores import CapabilityScores
    from calmix.models import open_model
    from calmix.pruning import SemiStructured, Unstructured, prune
    from calmix.recovery import recover
    from calmix.specs import recover_request

__all__ = [
    "CalibrationSet",
    "CalmixError",
    "CapabilityScores",
    "SemiStructured",
    "Unstructured",
    "evaluate",
    "export",
    "load",
    "measure",
    "open_model",
    "pack",
    "predict",
    "prune",
    "recover",
    "recover_request",
    "resolve",
    "sources",
    "unpack",
]

_HOMES = {
    "CalibrationSet": "calmix.calibration",
    "CalmixError": "calmix.errors",
    "CapabilityScores": "calmix.evaluation.scores",
    "SemiStructured": "calmix.pruning",
    "Unstructured": "calmix.pruning",
    "evaluate": "calmix.evaluation.evaluate",
    "export": "calmix.deploy.openvino",
    "load": "calmix.deploy.pack",
    "measure": "calmix.calibration.measuring",
    "open_model": "calmix.models",
    "pack": "calmix.deploy.pack",
    "predict": "calmix.analysis.predict",
    "prune": "calmix.pruning",
    "recover": "calmix.recovery",
    "recover_request": "calmix.specs",
    "resolve": "calmix.calibration",
    "unpack": "calmix.deploy.pack",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "sources":
        return importlib.import_module("calmix.sources")
    raise AttributeError(f"module 'calmix' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
