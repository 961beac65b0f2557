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

import shutil
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calmix.errors import disk_errors
from calmix.files import sync
from calmix.models.shards import tensor_bytes
from calmix.pruning.old_states import damaged
from calmix.pruning.old_work import WorkFolder

SUM = "crc32"  # in a file's metadata: of all its tensors, by order of name


class RecoveryFolder(WorkFolder):
    """The work folder of one recovery.

    Args:
        output: the checkpoint it is to become.
        unit: what is counted: `blocks` or `steps`.
    """

    def __init__(self, output: Path, unit: str) -> None:
        super().__init__(output)
        self.unit = unit

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors to a file and wait until they are on the disk."""
        path = self.path / name
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            held = {key: value.contiguous() for key, value in tensors.items()}
            save_file(held, path, {SUM: str(_sum(held))})
            sync(path)
            sync(path.parent)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file.

        Raises:
            InputError: they are not what was written.
        """
        path = self.path / name
        try:
            with safe_open(path, "pt") as file:
                wanted = (file.metadata() or {}).get(SUM)
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise damaged(path) from error
        if wanted != str(_sum(found)):
            raise damaged(path)
        return found

    def keep_only(self, *names: str) -> None:
        """Remove states and weights that are not named."""
        for path in self.path.iterdir():
            if path.name.startswith(("state-", "best-")) and path.name not in names:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _sum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor_bytes(tensor.cpu().contiguous()), value)
    return value
