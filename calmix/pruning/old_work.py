"""The work folder of a prune: all it takes to go on after an interruption at any moment.

    OUTPUT.unfinished/request.json       what was asked for; another request is refused
                      calibration/       the calibration set, calibration.json its manifest
                      dropped.json       experts' scores, and those that stay, where some go
                      allocation.json    sparsities by layer, where a look at the model gave them
                      checkpoint/        the files of the result, at full size, filled by block
                      blocks/            the blocks' weights, where transformers writes those files
                      states-0, -1, -2   hidden states before and after the block at hand
                      written-N          what blocks wrote into their arguments, up to block N
                      process-1, ...     states and written of the other processes, if several
                      progress.json      blocks that are done, and the report on them

A block counts as done when its weights and the next block's hidden states are on the disk; only
then is progress.json replaced, every `SAVING` seconds. The states it tells of are kept until it is
replaced again. It holds a sum of all that a later run reads, and its own hash: damage is told, and
not built upon.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import operator
import os
import shutil
import time
import zlib
from collections.abc import (
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from calmix.calibration import CalibrationSet
from calmix.errors import DiskError, InputError, disk_errors
from calmix.files import (
    check_output_folder,
    give_back,
    holds_result,
    parse_json,
    real_place,
    sync,
    sync_all,
    write_json,
)
from calmix.manifest import SEAL, other_versions, seal_holds, sealed
from calmix.models.shards import ShardWriter
from calmix.pruning import distributed
from calmix.pruning.old_states import KeptStates, Room, damaged
from calmix.pruning.patterns import Unstructured
from calmix.pruning.report import Dropped, PruneReport

SUFFIX = ".unfinished"
SAVING = 30.0  # seconds: at most so much is done again after an interruption
REQUEST, PROGRESS, SET, SET_MANIFEST, ALLOCATION, DROPPED = (
    "request.json", "progress.json", "calibration", "calibration.json", "allocation.json",
    "dropped.json",
)  # fmt: skip
OTHERS = "other_versions"  # in request.json: of what cannot change the bytes


class WorkFolder:
    """The work folder of one prune.

    Args:
        output: the checkpoint it is to become.
        every: seconds between two times at which blocks are counted as done; None for `SAVING`.
        rank, processes: this process's number, of how many that share the work; the first one
            claims the folder, writes the result and counts.

    Attributes:
        claimed: whether this process is at work in it.
        goes_on: whether it held work to go on with when it was claimed.
        upgraded: what has been upgraded since that work began and cannot change its bytes; or "".
        unit: what is counted as done.
    """

    unit = "blocks"

    def __init__(
        self, output: Path, every: float | None = None, rank: int = 0, processes: int = 1
    ) -> None:
        self.output = output = real_place(output)
        self.every, self.rank, self.processes = every, rank, processes
        self._peers = distributed.host_group() if processes > 1 else None
        self.path = output.with_name(output.name + SUFFIX)
        self.checkpoint = self.path / "checkpoint"
        self.writer: ShardWriter | None = None
        self.states: KeptStates | None = None
        self._lock = FileLock(output.with_name(f".{output.name}.lock"), thread_local=False)
        self._overwrite = False
        self._pool = ThreadPoolExecutor(1, "writing")
        self._pending: Future[None] | None = None
        self._leaves: list[Any] = []
        self._written: tuple[int, int] | None = None  # the block whose file it is, and its sum
        self.claimed = self.goes_on = False
        self.upgraded = ""
        self._kept_at = time.monotonic()

    @property
    def leads(self) -> bool:
        """Whether this process claims the folder, writes the result and counts."""
        return self.rank == 0

    @property
    def done(self) -> int:
        """Blocks that are done."""
        return self._counted("done")

    @property
    def begun(self) -> bool:
        """Whether there is work to go on with: blocks, or which experts go."""
        return bool(self.done or self.dropped())

    @property
    def batch(self) -> int:
        """Rows of a micro-batch in the blocks that are done: they decide how sums round."""
        return self._counted("batch")

    def _counted(self, key: str) -> int:
        count = self.progress().get(key, 0)
        if type(count) is not int:
            raise damaged(self.path / PROGRESS)
        return count

    def progress(self) -> dict[str, Any]:
        """Return how far an earlier run has come; empty if nowhere.

        Raises:
            InputError: the file is not what was written.
        """
        return self._sealed(PROGRESS) or {}

    def count(self, progress: Mapping[str, Any]) -> None:
        """Replace progress.json; `done` says how many blocks or steps count."""
        write_json(self.path / PROGRESS, sealed(progress))

    def claim(self, request: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
        """Take the folder for a request; return `goes_on`.

        Raises:
            InputError: another process works in it, it holds another request's work, or an
                interrupted run's that is neither to be resumed nor to be thrown away; or the
                output cannot be written.
        """
        if not self._alone():
            raise InputError(
                f"another process is at work on {self.output}: wait for it, or stop it"
            )
        try:
            check_output_folder(self.output, overwrite=overwrite)  # nobody else makes it now
            self.goes_on = self._take(request, resume, overwrite)
        except BaseException:
            give_back(self._lock)
            raise
        self.claimed, self._overwrite = True, overwrite
        # An interrupt while a thread is started loses it: none could then wait for what it writes.
        self._pool.submit(int).result()
        return self.goes_on

    def _alone(self) -> bool:
        """Take the lock on the output; return whether it was free. It ends with the process."""
        with disk_errors(self.output), contextlib.suppress(Timeout):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        return self._lock.is_locked

    def _take(self, request: Mapping[str, Any], resume: bool, overwrite: bool) -> bool:
        held = self._request()
        try:
            done, begun = self.done, self.begun
        except InputError:
            if not overwrite:
                raise
            begun = False
        if held is not None and begun and self.checkpoint.is_dir():
            if resume:
                if differs := _differing(held, request):
                    raise InputError(
                        f"{self.path} is the work of another request ({differs[0]}): "
                        "ask for the same, name another output, or delete it"
                    )
                others = self._others(request)
                if changed := _differing(held.get(OTHERS, others), others):
                    self.upgraded = (
                        f"other versions than at the start ({'; '.join(changed)}): the result "
                        "is the same"
                    )
                return True
            if not overwrite:
                raise InputError(
                    f"{self.path} holds an interrupted run with {done} {self.unit} done: "
                    "go on with --resume, start over with --overwrite, or name another output"
                )
        if held is None and self.path.exists() and not self._only_begun():
            raise InputError(f"{self.path} is in the way and holds no work of calmix: move it")
        with disk_errors(self.path):
            self._clear()
            self.path.mkdir(exist_ok=True)
            write_json(self.path / REQUEST, {**request, OTHERS: self._others(request)})
            self.checkpoint.mkdir()
            sync(self.path.parent)
        return False

    def _others(self, request: Mapping[str, Any]) -> dict[str, str]:
        return other_versions(request.get("versions", ()))

    def _only_begun(self) -> bool:
        """Tell whether a process was killed between making the folder and the request in it."""
        own = f".{REQUEST}."
        return self.path.is_dir() and all(p.name.startswith(own) for p in self.path.iterdir())

    def _clear(self) -> None:
        """Remove what is in the folder; what makes it work to go on with first, the request last.

        A process killed meanwhile leaves a folder that is calmix's, and not to be gone on with.
        """
        if not self.path.exists():
            return
        for name in (PROGRESS, DROPPED):
            (self.path / name).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != REQUEST:
                path.unlink()
        (self.path / REQUEST).unlink(missing_ok=True)

    def _request(self) -> dict[str, Any] | None:
        try:
            value = json.loads((self.path / REQUEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def remove_leftover(self) -> None:
        """Remove the folder of a run that ended after the output had its name."""
        if self._request() is not None and self._alone():
            self.abandon()

    def keep_calibration(self, drawn: CalibrationSet) -> None:
        """Keep the calibration set, so that it need not be drawn again."""
        keep_set(self.path, drawn)

    def calibration(self) -> CalibrationSet:
        """Return the calibration set that was kept, as it was drawn."""
        return kept_set(self.path)

    def keep_allocation(self, patterns: Mapping[str, Unstructured]) -> None:
        """Keep patterns by layer, so that the model need not be looked at again."""
        shares = {name: pattern.sparsity for name, pattern in patterns.items()}
        write_json(self.path / ALLOCATION, sealed(shares))

    def allocation(self) -> dict[str, Unstructured] | None:
        """Return the patterns by layer that were kept."""
        if (kept := self._sealed(ALLOCATION)) is None:
            return None
        return {name: Unstructured(share) for name, share in kept.items()}

    def keep_dropped(self, dropped: Sequence[Dropped]) -> None:
        """Keep which experts go, so that they need not be scored again."""
        kept = {DROPPED: [asdict(one) for one in dropped]}
        write_json(self.path / DROPPED, sealed(kept))

    def dropped(self) -> list[Dropped]:
        """Return which experts go, as far as it is known."""
        kept = self._sealed(DROPPED) or {DROPPED: []}
        return [Dropped(**one) for one in kept[DROPPED]]

    def _sealed(self, name: str) -> dict[str, Any] | None:
        return read_sealed(self.path / name)

    def restore(self, report: PruneReport) -> int:
        """Put the report on the blocks that are done into `report`; return how many they are.

        Raises:
            InputError: their weights are not what was written.
        """
        if not (kept := self.progress()):
            return 0
        if self.writer is not None:
            self.writer.check(kept["weights"])
        report.restore(kept)
        report.seconds = {key: float(value) for key, value in kept["seconds"].items()}
        return self.done

    def make_states(self, rows: Sequence[int], device: torch.device, room: Room) -> KeptStates:
        """Return hidden states, those that lead into the first block that is not done."""
        folder = self.path if self.leads else self.path / f"process-{self.rank}"
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        self.states = KeptStates(folder, rows, device, room, self.wait)
        if kept := self._part().get("states"):
            self.states.restore(kept["entries"], kept["side"])
        return self.states

    def restore_written(self, written: list[list[Any]]) -> None:
        """Put what the blocks that are done wrote into their arguments into what was recorded."""
        if (kept := self._part().get("written")) is not None:
            match kept:
                case [int(block), int(wanted)]:
                    path = self._written_file(block)
                case _:
                    raise damaged(self.path / PROGRESS)
            self._written = block, wanted
            content = path.read_bytes() if path.is_file() else b""
            if zlib.crc32(content) != wanted:
                raise damaged(path)
            assert self.states is not None
            saved = torch.load(io.BytesIO(content), self.states.device, weights_only=True)
            for values, contents in zip(written, saved, strict=True):
                values[:] = [_refilled(v, held) for v, held in zip(values, contents, strict=True)]
        self._leaves = list(_leaves(written))

    def _part(self) -> dict[str, Any]:
        """Return what progress.json tells of this process's states; empty if there is none."""
        if (parts := self.progress().get("parts")) is None:
            return {}
        if not isinstance(parts, list) or len(parts) != self.processes:
            raise damaged(self.path / PROGRESS)
        return dict(parts[self.rank])

    def finish_block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        report: PruneReport,
        written: list[list[Any]],
        *,
        overlap: bool,
        last: bool,
    ) -> None:
        """Write a block's weights; if it is time, or the `last` block, count all until it as done.

        Args:
            index: the block.
            tensors: its weights, by name.
            report: on this block and those before.
            written: what stands in the slots of its arguments; kept if blocks have changed it.
            overlap: whether to return before all is written.
            last: whether no block follows.
        """
        self.wait()
        moved = self.states is not None and self.states.turn()
        every = SAVING if self.every is None else self.every
        due = last or time.monotonic() - self._kept_at >= every
        if self.processes > 1:
            due = distributed.once(lambda: due)
        count = self._counting(index, report, written, moved=moved) if due else None

        def finish() -> None:
            if self.writer is not None:
                self.writer.write(tensors)
            if count is not None:
                count()

        self._pending = self._pool.submit(finish)
        if not overlap:
            self.wait()

    def _counting(
        self, index: int, report: PruneReport, written: list[list[Any]], *, moved: bool
    ) -> Callable[[], None]:
        """Return what brings all to the disk and then counts a block as done.

        It is called when the block's weights are written, while the next one is at work. Several
        processes wait until all have their part there, and go on once it is counted.
        """
        self._kept_at = time.monotonic()
        keep = self.states.keeping() if self.states is not None and moved else None
        leaves, contents = list(_leaves(written)), None
        if len(leaves) != len(self._leaves) or any(map(operator.is_not, leaves, self._leaves)):
            contents = [[_plain(value) for value in values] for values in written]
            self._leaves = leaves
        progress = {
            "done": index + 1,
            "batch": 0 if self.states is None else self.states.rows[0],
            "seconds": dict(report.seconds),
            **report.parts(),
        }

        def count() -> None:
            states = None if keep is None else keep()
            before = self._written
            if contents is not None:
                self._written = index, _save(self._written_file(index), contents)
            part = {"states": states, "written": self._written}
            parts = [part] if self.processes == 1 else distributed.everyone(part, self._peers)
            if self.writer is not None:
                self.writer.sync()
                self.count(progress | {"weights": self.writer.sums, "parts": parts})
            if self.processes > 1:
                distributed.everyone(None, self._peers)
            if self.states is not None and states is not None:
                self.states.counted = frozenset({states["side"]})
            if before not in (None, self._written):
                self._written_file(before[0]).unlink(missing_ok=True)

        return count

    def _written_file(self, block: int) -> Path:
        folder = self.path if self.states is None else self.states.folder
        return folder / f"written-{block}"

    def wait(self) -> None:
        """Wait for the block that is being written, and raise what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def complete(self) -> None:
        """Turn the checkpoint into the output, and remove the folder."""
        self.wait()
        with disk_errors(self.output):
            if self.output.exists():
                replaceable = self._overwrite and holds_result(self.output)
                if any(self.output.iterdir()) and not replaceable:
                    raise DiskError(f"{self.output} has been filled meanwhile: move it")
                old = self.path / "replaced"
                shutil.rmtree(old, ignore_errors=True)
                self.output.rename(old)
            sync_all(self.checkpoint)
            self.checkpoint.rename(self.output)
            sync(self.output.parent)
        self.abandon()

    def settle(self) -> None:
        """Let the block that is being written end, well or not; none is written after it."""
        self._pool.shutdown(wait=True)

    def close(self) -> None:
        """Let go of the folder; what is in it stays."""
        self.settle()
        self.claimed = False
        if self.leads:
            give_back(self._lock)

    def abandon(self) -> None:
        """Remove the folder and let go of it."""
        self.settle()
        if not self.leads:
            return
        with contextlib.suppress(OSError):
            self._clear()
            self.path.rmdir()
        self.close()


def keep_set(folder: Path, drawn: CalibrationSet) -> None:
    """Keep a calibration set in a folder, its manifest as it was drawn."""
    drawn.save(folder / SET, overwrite=True)
    write_json(folder / SET_MANIFEST, sealed(drawn.manifest))


def kept_set(folder: Path) -> CalibrationSet:
    """Return the calibration set that was kept in a folder.

    Raises:
        InputError: it is not what was written.
    """
    held = CalibrationSet.open(folder / SET)
    if (manifest := read_sealed(folder / SET_MANIFEST)) is None:
        raise damaged(folder / SET_MANIFEST)
    return CalibrationSet(held.ids, held.sources, manifest)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return a small file's content; None if there is none.

    Raises:
        InputError: it is not what was written.
    """
    try:
        kept = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise damaged(path) from error
    if not isinstance(kept, dict) or not seal_holds(kept):
        raise damaged(path)
    del kept[SEAL]
    return kept


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what stands in dicts, lists and tuples, however deep."""
    if isinstance(value, MutableMapping):
        value = list(value.values())
    if not isinstance(value, MutableSequence | tuple):
        yield value
        return
    for held in value:
        yield from _leaves(held)


def _plain(value: Any) -> Any:
    """Return a dict or list of whatever class as a plain one."""
    return dict(value) if isinstance(value, MutableMapping) else list(value)


def _refilled(value: Any, contents: Any) -> Any:
    """Return a dict or list of the class of `value`, with other contents."""
    made = copy.copy(value)
    made.clear()
    if isinstance(made, MutableMapping):
        made.update(contents)
    else:
        made.extend(contents)
    return made


def _save(path: Path, value: Any) -> int:
    """Write a value to the disk and return the CRC-32 of the file."""
    content = io.BytesIO()
    torch.save(value, content)
    with disk_errors(path), path.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    return zlib.crc32(content.getbuffer())


def _differing(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return what differs, those within by their own names, as `torch: 2.12, now 2.13`."""
    found: list[str] = []
    for key, value in asked.items():
        before = held.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            found += _differing(before, dict.fromkeys(before) | value)
        elif before != value:
            found.append(f"{key}: {_short(before)}, now {_short(value)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
