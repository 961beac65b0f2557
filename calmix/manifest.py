"""Manifests: what went into an artefact, and what the run that made it was like.

Two parts, kept in two files. The manifest holds what decides the bytes (inputs by hash, seeds,
versions) and is itself the same for the same inputs; the run record holds what differs from run
to run (date, machine, seconds).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Return the versions of what computes: Python, calmix and the libraries under it."""
    names = ("calmix", "torch", "transformers", "tokenizers", "safetensors")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version()} | found


def run_record(seconds: dict[str, float]) -> dict[str, Any]:
    """Return date, machine and seconds by activity of the run that ends now."""
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
