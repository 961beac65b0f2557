"""The work folder of a recovery: all it takes to go on after an interruption at any moment.

    OUTPUT.unfinished/request.json, calibration/, checkpoint/    as for a prune
                      progress.json                              how far it is, and the report

of a distillation

                      dense/        what the dense model's head sees, whole once it is counted
                      state-N/      masters and moments after N steps, a file a process
                      best-N        the weights as they are to be written, best so far

and block by block

                      dense/, pruned/    hidden states around a block, made again when it goes on

progress.json is replaced only once what it names is on the disk; what it no longer names goes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from calmix.errors import disk_errors
from calmix.files import sync, write_json
from calmix.pruning.work import PROGRESS, WorkFolder


class RecoveryFolder(WorkFolder):
    """The work folder of one recovery.

    Args:
        output: the checkpoint it is to become.
        unit: what is counted: `blocks` or `steps`.
    """

    def __init__(self, output: Path, unit: str) -> None:
        super().__init__(output)
        self.unit = unit

    def progress(self) -> dict[str, Any]:
        """Return how far an earlier run has come; empty if nowhere."""
        try:
            kept = json.loads((self.path / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}

    def count(self, progress: dict[str, Any]) -> None:
        """Replace progress.json; `done` says how many blocks or steps count."""
        write_json(self.path / PROGRESS, progress)

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors to a file and wait until they are on the disk."""
        path = self.path / name
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
            sync(path)
            sync(path.parent)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file."""
        return load_file(self.path / name)

    def keep_only(self, *names: str) -> None:
        """Remove states and weights that are not named."""
        for path in self.path.iterdir():
            if path.name.startswith(("state-", "best-")) and path.name not in names:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
