"""Runs trials in one process, with an open model and whatever the trials share.

Trials that differ only in recovery are pruned once. The model is reopened before it is pruned
again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.distance_texts import builtin_readers, texts
from calmix.calibration.request import calibration_set
from calmix.errors import InputError
from calmix.evaluation.distance import distance, reference
from calmix.evaluation.evaluate import SCORER, evaluate, form_of
from calmix.evaluation.scores import load_scores
from calmix.files import sha256_json, write_json
from calmix.manifest import run_record, versions
from calmix.models.opening import OpenModel, open_model
from calmix.options import DeviceOptions, TrialOptions
from calmix.precision import dtype_name
from calmix.pruning.allocation import allocate
from calmix.pruning.checkpoint import write_checkpoint
from calmix.pruning.engine import Patterns, prune
from calmix.pruning.report import PruneReport
from calmix.pruning.work import CHECKPOINT
from calmix.recovery.checkpoint import recover
from calmix.study.results import Trial
from calmix.study.spec import Study
from calmix.study.store import RESULT, TRIAL_SCORES, Store
from calmix.study.trials import Key, Planned

PRUNING, RECOVERY = "pruning.json", "recovery.json"
TRIAL_FIELDS = ("id", "model", "calibration", "strategy", "pattern", "rows", "length", "seed")
TASK_FIELDS = {
    "name": "task",
    "kept": "retention",
}  # fields renamed in a trial's record of its tasks

Tick = Callable[[str, int, int], None]  # name of the step, amount done, total amount


class Bench:
    """Runs trials of a study one after another in this process."""

    def __init__(self, study: Study, store: Store, options: TrialOptions) -> None:
        self.study, self.store, self.allows = study, store, options.allow_code_execution
        self.how: dict[str, Any] = options.model_dump(include=set(DeviceOptions.model_fields))
        self.opened: OpenModel | Any = None
        self._label: str | None = None
        # Key and report of the last pruning of the open model; None while its weights are dense.
        self._pruned: tuple[Key, PruneReport | Any] | None = None

    def ready(self, label: str, stage: Tick) -> None:
        """Open and score the dense model of a label, unless it is ready."""
        if self._label == label:
            return
        stage("opening the model", 0, 1)
        self._reference = None
        self._open(label)
        opened, suite = self.opened, self.study.suite
        if known := [name for name in suite.dimensions if name in builtin_readers()]:
            self._reference = reference(opened, texts(opened, dimensions=known), cache=True)
        kind = [str(opened.model.dtype), opened.model.device.type, SCORER]
        files = [opened.fingerprint, opened.tokenizer_fingerprint, *form_of(opened, suite)]
        self._key = sha256_json([*files, suite.hash, kind])
        path = self.store.dense(self._key)
        with self.store.lock(f"dense-{self._key[:32]}"):
            try:
                self._dense = load_scores(path)
            except InputError:  # missing, of an older format, or damaged
                self._dense = evaluate(
                    opened,
                    suite,
                    allow_code_execution=self.allows,
                    cache=True,
                    repeat=True,
                    progress=lambda *of: stage("scoring the dense model", *of),
                )
                self._dense.save(path)

    def _open(self, label: str) -> None:
        """Open the dense model of a label, unless it is already open."""
        if self._label != label or self._pruned is not None:
            self._label = self.opened = self._pruned = None  # free the memory first
            self.opened = self._dense_model(label)
            self._label = label

    def _dense_model(self, label: str) -> OpenModel:
        entry = self.study.file.models[label]
        return open_model(entry.name, dtype=entry.dtype, **self.how)

    def run(self, trial: Planned, stage: Tick, note: Callable[[str], None]) -> Trial:
        """Run one trial of the model made `ready`, write it to the store and return it."""
        seconds = dict[str, float]()
        began = at = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal at
            before, at = at, time.perf_counter()
            seconds[name] = round(at - before, 3)

        calibration = self._calibration(trial, stage, note)
        lap("calibration")
        report = self._prune(trial, calibration, lambda *of: stage("pruning", *of))
        lap("prune")
        if self.opened.fingerprint != trial.definition["model"]["sha256"]:
            raise InputError(f"the files of {self.opened.name} have changed: run the study again")
        with self.store.writing(trial) as folder:
            write_json(folder / PRUNING, report.to_dict())
            scored = self.opened
            if trial.recovery is not None and trial.calibration_id is not None:
                folder_of_set = str(self.store.calibration(trial.calibration_id))
                write_checkpoint(self.opened, folder / "pruned", report, calibration, trial.request)
                recovered = recover(
                    str(folder / "pruned"),
                    self.study.file.models[trial.model].name,
                    trial.recovery.model_copy(update={"calibration": folder_of_set}),
                    folder / CHECKPOINT,
                    progress=lambda done, total, loss: stage("recovering", done, total),
                    **self.how,
                )
                write_json(folder / RECOVERY, recovered.to_dict())
                kind = dtype_name(self.opened.model.dtype)
                scored = open_model(str(folder / CHECKPOINT), dtype=kind, **self.how)
                shutil.rmtree(folder / "pruned")
                lap("recover")
            elif self.study.file.keep_checkpoints:
                write_checkpoint(
                    self.opened, folder / CHECKPOINT, report, calibration, trial.request
                )
            scores = evaluate(
                scored,
                self.study.suite,
                baselines=False,
                allow_code_execution=self.allows,
                progress=lambda *of: stage("scoring", *of),
            )
            if self._reference is not None:
                divergence = distance(
                    scored,
                    self._reference,
                    dense=partial(self._dense_model, trial.model),
                    progress=lambda *of: stage("distance", *of),
                )
                scores = replace(scores, distance=divergence)
            if not self.study.file.keep_checkpoints:
                shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
            lap("evaluate")
            retention = scores.retention(self._dense, "primary")
            seconds["total"] = round(time.perf_counter() - began, 3)
            outcome = Trial(
                **{name: getattr(trial, name) for name in TRIAL_FIELDS},
                method=trial.recipe,
                mix=(trial.definition["calibration"] or {}).get("mix", {}),
                sparsity=report.sparsity,
                propagation=trial.request.propagation,
                suite=self.study.suite.name,
                total=retention.total,
                worst=retention.worst,
                seconds=seconds,
                dimensions={one.name: one.kept for one in retention.dimensions},
                tasks=tuple(
                    {
                        TASK_FIELDS.get(key, key): value
                        for key, value in asdict(one).items()
                        if key != "noise"
                    }
                    for one in retention.tasks
                ),
            )
            run = run_record(seconds) | {
                "versions": versions() | scores.versions,
                "dtype": scores.dtype,
                "device": self.opened.model.device.type,
            }
            scores.save(folder / TRIAL_SCORES)
            record = {"trial": outcome.model_dump(mode="json"), "run": run, "dense": self._key}
            write_json(folder / RESULT, record)
        return outcome

    def _prune(
        self,
        trial: Planned,
        calibration: CalibrationSet | None,
        progress: Callable[[int, int], None],
    ) -> PruneReport:
        """Prune the dense model, unless the open model was pruned in the same way."""
        if self._pruned is not None and self._pruned[0] == trial.pruned:
            return self._pruned[1]
        self._open(trial.model)
        model, request = self.opened, trial.request
        ids, method = None if calibration is None else calibration.ids, request.chosen.text
        pattern: Patterns = request.target
        if request.mixed:
            assert ids is not None
            pattern = allocate(model.model, ids, request.target, method=request.chosen)
        self._pruned = (), None
        report = prune(
            model,
            ids,
            method=method,
            pattern=pattern,
            progress=progress,
            propagation=request.propagation or "sequential",
            statistics=request.statistics or "robust",
            embeddings=request.embeddings,
        )
        self._pruned = trial.pruned, report
        return report

    def _calibration(
        self, trial: Planned, stage: Tick, note: Callable[[str], None]
    ) -> CalibrationSet | None:
        """Return a trial's calibration set, from the store or made with the dense model."""
        if trial.calibration_id is None:
            return None
        folder = self.store.calibration(trial.calibration_id)
        with self.store.lock(f"set-{trial.calibration_id}"):
            if not folder.is_dir():
                stage("calibration set", 0, 1)
                self._open(trial.model)
                assert trial.parsed is not None
                drawn = calibration_set(trial.parsed, self.opened, writing=stage, note=note)
                drawn.save(folder)
            return CalibrationSet.open(folder, self.opened)
