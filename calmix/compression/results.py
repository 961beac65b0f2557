"""Whether the results in a folder of `calmix compress` were made from one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from calmix.calibration import CalibrationSet, saved_set
from calmix.compression.plan import Stage
from calmix.errors import InputError
from calmix.evaluation.scores import CapabilityScores
from calmix.files import cached_sha256, user_path
from calmix.manifest import Input, changed, check_inputs, file_hashes, read_record
from calmix.models.opening import combined, model_files
from calmix.pruning.checkpoint import MANIFEST


class Results:
    """Compares results with what they were made from, and hashes every model once.

    Args:
        hashed: returns the SHA-256 of a file; by default from the cache, if the file has the size
            and times that it had when it was read.
    """

    def __init__(self, hashed: Callable[[Path], str] = cached_sha256) -> None:
        self._hashed, self._known = hashed, dict[Path, dict[str, str]]()

    def check(self, stage: Stage, out: Path) -> None:
        """Refuse a stage's result, unless this stage made it from what lies there now.

        An input that is gone, such as a pruned model after its recovery, is not compared.
        """
        path = out / str(stage.leaves)
        remedy = f"put back what was there, or delete {path} and run its calmix compress again"
        inputs = {
            role: one if one.sha256 else Input(one.name, self.sha256(Path(one.name)))
            for role, one in stage.reads.items()
            if one.sha256 or Path(one.name).exists()
        }
        check_inputs(path, read_record(path), inputs, stage.request, remedy)
        if (path / MANIFEST).exists():
            self.hashes(path)

    def check_all(self, stages: Iterable[Stage], out: Path) -> None:
        """Check the results that exist."""
        for stage in stages:
            if stage.done(out):
                self.check(stage, out)

    def check_scores(self, file: Path, scores: CapabilityScores) -> bool:
        """Refuse a file of scores if the folder of its model holds another model now; return
        whether there is such a folder."""
        folder = user_path(scores.model)
        if not (folder / "config.json").is_file():
            return False
        record = {"model": {"name": scores.model, "sha256": scores.fingerprint}}
        now = {"model": Input(scores.model, self.sha256(folder))}
        check_inputs(file, record, now, {}, f"put back what was there, or make {file} again")
        return True

    def sha256(self, path: Path) -> str:
        """Return the hash that identifies a calibration set or a model."""
        if saved_set(path) is not None:
            return CalibrationSet.open(path).sha256
        names = model_files(path)
        if (path / MANIFEST).exists():
            return combined({name: self.hashes(path)[name] for name in names})
        return combined({name: self._hashed(path / name) for name in names})

    def hashes(self, folder: Path) -> dict[str, str]:
        """Return the SHA-256 of each of a checkpoint's files; refuse one that its manifest does not
        have."""
        if folder not in self._known:
            hashes = file_hashes(folder, hashed=self._hashed)
            if wrong := changed(folder, read_record(folder)["files"], hashes):
                raise InputError(f"{wrong[0]}: put it back, or make {folder} again")
            self._known[folder] = hashes
        return self._known[folder]
