"""What the benchmarks share: data folder, machine in words, the rival, what a model keeps."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import calmix
from calmix.precision import capabilities

HERE = Path(__file__).parent


def data_file(folder: str | None, relative: str) -> Path:
    """Return a file of the data folder, or end with what is missing."""
    folder = folder or os.environ.get("CALMIX_DATA")
    if not folder:
        sys.exit("name the data folder: --data DIR or CALMIX_DATA")
    path = Path(folder) / relative
    if not path.is_file():
        sys.exit(f"the data folder has no {relative}")
    return path


def machine() -> str:
    """Return processor, threads and library versions in one line."""
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    isa = "AMX" if capabilities().get("amx_bf16") else "no AMX"
    return f"{name} ({isa}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def commit() -> str:
    """Return the short hash of the commit the benchmark runs from, with + if there are changes."""
    run = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(run, capture_output=True, text=True).stdout.strip() or "unknown"


def run_rival(python: str, ids: torch.Tensor, **options: Any) -> dict[str, Any]:
    """Run rival_llmcompressor.py on ids and return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({"ids": ids.contiguous()}, Path(folder) / "ids.safetensors")
        # Absolute, since the rival runs in a folder of its own; not resolved: a link is what makes
        # an interpreter that of its environment.
        command = [str(Path(python).absolute()), str(HERE / "rival_llmcompressor.py")]
        command += ["--ids", str(Path(folder) / "ids.safetensors")]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"the rival failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Readout:
    """What a model keeps, in per cent, by dimension and in total.

    Args:
        file: a Python file with `readout(folder) -> {dimension: {text: bits per byte}}`; kept is
            the mean over dimensions of the mean of dense over pruned. None: the quick slice of the
            offline suite, by `ratio`.
    """

    def __init__(self, file: Path | None) -> None:
        self._dense: dict[str, Any] = {}
        self._read = None
        if file is not None:
            spec = importlib.util.spec_from_file_location("readout", file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self._read = module.readout

    def kept(self, dense: Path, pruned: Path) -> dict[str, float]:
        return means(self.texts(dense, pruned))

    def texts(self, dense: Path, pruned: Path) -> dict[str, dict[str, float]]:
        """Return what is kept of every text, or task of the suite, by dimension."""
        key = str(dense)
        if self._read is None:
            before = self._dense.get(key) or calmix.evaluate(key, "offline", quick=True)
            self._dense[key] = before
            found = calmix.evaluate(str(pruned), "offline", quick=True, baselines=False)
            made: dict[str, dict[str, float]] = {}
            for task in found.retention(before, measure="ratio", resamples=2).tasks:
                if task.kept.value is not None:
                    made.setdefault(task.dimension, {})[task.name] = 100 * task.kept.value
            return made
        if key not in self._dense:
            self._dense[key] = self._read(dense)
        bits = self._read(pruned)
        return {
            name: {text: 100 * whole / bits[name][text] for text, whole in texts.items()}
            for name, texts in self._dense[key].items()
        }


def means(texts: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the mean of each dimension's texts, and `total`, the mean of those."""
    made = {name: float(np.mean(list(kept.values()))) for name, kept in texts.items()}
    return made | {"total": float(np.mean(list(made.values())))}
