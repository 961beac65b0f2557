"""What the benchmarks share: the data folder, the rival's interpreter, the machine in words."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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
    isa = "AMX" if torch.cpu.get_capabilities().get("amx_bf16") else "no AMX"
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
