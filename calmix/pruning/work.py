"""The work folder of an unfinished run: everything needed to resume after a kill at any time.

    OUTPUT.unfinished/work.json      sealed: the request, and what is done
                      calibration/   the calibration set, as drawn
                      checkpoint/    finished files of the output
                      scratch/       hidden states and the like, of the current run only
                      state-N, best-N   of a distillation

A run uses it in this order:

    work = WorkFolder(output)
    work.claim(identity, resume=resume, overwrite=overwrite)  # it determines the output's bytes
    work.resumes, work.done, work.state["anything"]         # left by an earlier run
    work.save("checkpoint/model-00002-of-00031.safetensors", tensors)
    work.keep(done=3, anything=value)                       # from here on it counts
    work.complete()                                         # checkpoint/ becomes the output

and `work.leave(error, note)` on an error. work.json is replaced atomically, so the files it lists
are complete; a file saved after it is written again when the run resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.request import calibration_set
from calmix.calibration.tokenizer import OpenTokenizer
from calmix.errors import CalmixError, DiskError, InputError, PassingError, disk_errors
from calmix.files import (
    atomic_folder,
    check_output_folder,
    give_back,
    hidden,
    holds_result,
    put_folder,
    real_place,
    sha256_file,
    write_json,
)
from calmix.manifest import differences, read_sealed, sealed
from calmix.models.loading import check_length
from calmix.models.opening import OpenModel
from calmix.models.shards import read_file, tensor_bytes, write_file
from calmix.pruning.requests import How, PruneRequest, RecoverRequest

SUFFIX, RECORD, CHECKPOINT, SET = ".unfinished", "work.json", "checkpoint", "calibration"


class WorkFolder:
    """The work folder of one run.

    Args:
        output: the checkpoint it will become.
        unit: what `done` counts: blocks or steps.

    Attributes:
        state: recorded facts: `done`, `files` (SHA-256 by name), and all else passed to `keep`.
        resumes: whether it held an earlier run's work when claimed.
    """

    def __init__(self, output: Path, unit: str = "blocks") -> None:
        self.output, self.unit = real_place(output), unit
        self.path = self.output.with_name(self.output.name + SUFFIX)
        self.checkpoint = self.path / CHECKPOINT
        self.state: dict[str, Any] = {}
        self.resumes = self._overwrite = False
        self._identity: dict[str, Any] = {}
        self._new = not self.output.parent.exists()
        place = self.output.with_name(f".{self.output.name}.lock")
        self._lock = FileLock(place, thread_local=False)

    @property
    def claimed(self) -> bool:
        """Whether this process holds the folder."""
        return self._lock.is_locked

    @property
    def done(self) -> int:
        """Number of blocks or steps done."""
        return int(self.state.get("done", 0))

    @property
    def bytes(self) -> int:
        """Size of the folder on disk, in bytes, without temporary files."""
        lasting = (path for path in self.path.glob("*") if path.name != "scratch")
        files = (file for path in lasting for file in (path, *path.rglob("*")) if file.is_file())
        return sum(file.stat().st_blocks * 512 for file in files)

    @property
    def begun(self) -> bool:
        """Whether there is something to resume."""
        return bool(self.done or self.state.get("dropped"))

    def claim(self, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Take the folder, and the record of an earlier run, for a request."""
        self._identity, self._overwrite = json.loads(json.dumps(identity)), overwrite
        try:
            self._take(resume, overwrite)
        except BaseException:
            give_back(self._lock)
            raise
        self.resumes = self.begun

    def _take(self, resume: bool, overwrite: bool) -> None:
        with disk_errors(self.output), suppress(Timeout):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        if not self.claimed:
            raise InputError(f"another process is at work on {self.output}: wait, or stop it")
        check_output_folder(self.output, overwrite=overwrite)  # no other process can create it now
        try:
            record = read_record(self.path)
        except InputError:
            if not overwrite:
                raise
            record = {"kept": {}}
        self.state = record.get("kept", {})
        if self.begun and self.checkpoint.is_dir() and (resume or not overwrite):
            if not resume:
                raise InputError(
                    f"{self.path} holds an interrupted run with {self.done} {self.unit} done: "
                    "resume it with --resume, start over with --overwrite, or name another output"
                )
            if changed := next(differences(record["request"], self._identity), None):
                raise InputError(
                    f"{self.path} is the work of another request ({changed}): request the same, "
                    "name another output, or delete it"
                )
            shutil.rmtree(self.path / "scratch", ignore_errors=True)
            return
        empty = not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
        if not record and not empty:
            raise InputError(f"{self.path} is in the way and was not made by calmix: move it")
        self.state = {}
        with atomic_folder(self.path) as folder:
            (folder / CHECKPOINT).mkdir()
            self._write(folder)

    def _write(self, folder: Path) -> None:
        write_json(folder / RECORD, sealed({"request": self._identity, "kept": self.state}))

    def keep(self, **facts: Any) -> None:
        """Record the saved files and JSON-serialisable facts."""
        self.state |= facts
        self._write(self.path)

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to a safetensors file of the folder, atomically."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        self.state.setdefault("files", {})[name] = write_file(self.path / name, tensors)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a saved file; an InputError if it has changed."""
        path, wanted = self.path / name, self.state.get("files", {}).get(name)
        if not path.is_file() or wanted != sha256_file(path):
            raise _damaged(path)
        return read_file(path)

    def check(self, hashes: Mapping[str, str]) -> None:
        """Refuse files that changed since saving; `hashes` are those of the checkpoint."""
        for name, wanted in self.state.get("files", {}).items():
            folder, _, file = name.partition("/")
            actual = hashes.get(file) if folder == CHECKPOINT else sha256_file(self.path / name)
            if actual != wanted:
                raise _damaged(self.path / name)

    def scratch(self, name: str) -> Path:
        """Return a new folder for temporary files of this run."""
        path = self.path / "scratch" / name
        with disk_errors(path):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        return path

    def complete(self) -> None:
        """Turn the checkpoint into the output, and remove the folder."""
        with disk_errors(self.output):
            if self.output.exists():
                replaceable = self._overwrite and holds_result(self.output)
                if any(self.output.iterdir()) and not replaceable:
                    raise DiskError(
                        f"{self.output} was created while calmix was running: move it, then run "
                        "again"
                    )
            put_folder(self.checkpoint, self.output)
        self.abandon()

    def leave(self, error: BaseException, note: Callable[[str], None]) -> None:
        """Keep only what a later run can resume, and say so if resuming may succeed.

        An input error would recur, unlike a full disk, an interrupt or a bug. The work of an
        earlier run is always kept.
        """
        if not self.claimed:
            return
        again = isinstance(error, DiskError | PassingError) or not isinstance(error, CalmixError)
        stays = self.resumes or (self.begun and again)
        self.abandon(stays=stays)
        if stays and again:
            what = f"{self.done} {self.unit}" if self.done else "the experts' scores"
            note(f"{what} are kept in {self.path}: resume with --resume")

    def abandon(self, *, stays: bool = False) -> None:
        """Release the folder; remove it unless it stays."""
        if self.claimed and not stays:
            with suppress(OSError), hidden(self.path) as aside:
                self.path.rename(aside / RECORD)
        give_back(self._lock)
        if self._new:
            with suppress(OSError):
                self.output.parent.rmdir()

    def remove_leftover(self) -> None:
        """Remove what a run that was killed after its output was complete has left: the folder, or
        a part of it under a hidden name, and the lock."""
        ours = (self.path / RECORD).is_file() or not self.path.exists()
        if ours and not self.checkpoint.exists():
            with suppress(Timeout, OSError):  # another process, or a read-only place
                self._lock.acquire(blocking=False)
            self.abandon()


class States:
    """The hidden states of micro-batches by number; setting one replaces it.

    They stay on the device as long as there is room; the rest are stored in one file each. A block
    may return another type or shape than it takes.

    Args:
        folder: for the files.
        device: where states are computed.
        room: bytes they may take on the device.
    """

    def __init__(self, folder: Path, device: torch.device, room: int = 0) -> None:
        self.folder, self.device, self._room = folder, device, room
        self._held: dict[int, Tensor] = {}  # meta tensors for those in files

    def __getitem__(self, number: int) -> Tensor:
        """Return a copy, on the device."""
        state = self._held[number]
        if not state.is_meta:
            return state.clone()
        read: Any = torch.from_numpy(np.fromfile(self.folder / str(number), np.uint8))
        return read.view(state.dtype).view(state.shape).to(self.device)

    def __delitem__(self, number: int) -> None:
        if self._release(number).is_meta:
            (self.folder / str(number)).unlink()

    def _release(self, number: int) -> Tensor:
        """Forget a state and return it; its file, if it has one, stays."""
        old = self._held.pop(number)
        self._room += 0 if old.is_meta else old.nbytes
        return old

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        if number in self._held:
            self._release(number)
        if hidden.nbytes <= self._room:
            self._room -= hidden.nbytes
        else:
            with disk_errors(self.folder):
                path = self.folder / str(number)
                path.write_bytes(tensor_bytes(hidden.to("cpu").contiguous()))
            hidden = torch.empty_like(hidden, device="meta")
        self._held[number] = hidden


def draw_set(
    work: WorkFolder,
    request: PruneRequest | RecoverRequest,
    tokenizer: OpenTokenizer,
    model: Callable[[], OpenModel],
    run: How,
) -> CalibrationSet:
    """Return the set of resumed work, or draw it and save it in the work folder.

    `model` opens the model for self-written text.
    """
    if work.resumes:
        saved = CalibrationSet.open(work.path / SET)
        return CalibrationSet(saved.ids, saved.sources, work.state["calibration"])
    check_length(request.drawing.draw.length, tokenizer.context)
    source = model() if request.drawing.written else tokenizer
    drawn = calibration_set(request.drawing, source, writing=run.writing, note=run.note)
    drawn.save(work.path / SET, overwrite=True)
    work.keep(calibration=drawn.manifest)
    return drawn


def read_record(folder: Path) -> dict[str, Any]:
    """Return `request` and `kept` from a folder's work.json; {} if there is none."""
    path = folder / RECORD
    try:
        return read_sealed(path, "") if path.exists() else {}
    except InputError as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged or missing: start over with --overwrite")
