"""Runs trials in one process, which share sets, dense scores and pruned models.

A trial is pruned as by `calmix prune`, resumes as that does, and what is scored is the checkpoint.
Trials that differ only in recovery are pruned once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from calmix.calibration.distance_texts import builtin_readers, texts
from calmix.calibration.request import calibration_set, parse_calibration
from calmix.errors import InputError
from calmix.evaluation.distance import distance, reference
from calmix.evaluation.evaluate import SCORER, evaluate, form_of
from calmix.evaluation.scores import load_scores
from calmix.files import remove, sha256_json, write_json
from calmix.manifest import run_record, versions
from calmix.models.folder import fingerprint
from calmix.models.opening import OpenModel, open_model, resolve_model
from calmix.options import DeviceOptions, DrawOptions, TrialOptions
from calmix.precision import dtype_name
from calmix.pruning.checkpoint import prune_checkpoint
from calmix.pruning.report import PruneReport
from calmix.pruning.requests import PruneRequest
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
        self._label: str | None = None
        # Key, report and folder of the last pruned model, which the next trial may recover.
        self._pruned: tuple[Key, PruneReport, Path] | None = None

    def ready(self, label: str, stage: Tick) -> None:
        """Score the dense model of a label, unless it was the last one scored."""
        if self._label == label:
            return
        stage("opening the model", 0, 1)
        self._label = self._reference = None
        opened, suite = self._dense_model(label), self.study.suite
        if known := [name for name in suite.dimensions if name in builtin_readers()]:
            self._reference = reference(opened, texts(opened, dimensions=known), cache=True)
        self._dtype, self._device = dtype_name(opened.model.dtype), opened.model.device.type
        kind = [str(opened.model.dtype), self._device, SCORER]
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
        self._label = label

    def _dense_model(self, label: str) -> OpenModel:
        entry = self.study.file.models[label]
        return open_model(entry.name, dtype=entry.dtype, **self.how)

    def close(self) -> None:
        """Remove the last pruned model."""
        if self._pruned is not None:
            remove(path := self._pruned[2])
            with suppress(OSError):  # others are at work there
                path.parent.rmdir()
        self._pruned = None

    def run(self, trial: Planned, stage: Tick, note: Callable[[str], None]) -> Trial:
        """Run one trial of the model made `ready`, write it to the store and return it."""
        seconds = dict[str, float]()
        began = at = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal at
            before, at = at, time.perf_counter()
            seconds[name] = round(at - before, 3)

        self._draw(trial, stage, note)
        lap("calibration")
        report, pruned = self._prune(trial, lambda *of: stage("pruning", *of))
        lap("prune")
        name = self.study.file.models[trial.model].name
        if fingerprint(resolve_model(name)) != trial.definition["model"]["sha256"]:
            raise InputError(f"the files of {name} have changed: run the study again")
        with self.store.writing(trial) as folder:
            write_json(folder / PRUNING, report.to_dict())
            result = pruned
            if trial.recovery is not None and trial.calibration_id is not None:
                result, set_folder = folder / CHECKPOINT, self._set(trial)
                recovered = recover(
                    str(pruned),
                    name,
                    trial.recovery.model_copy(update={"calibration": set_folder}),
                    result,
                    progress=lambda done, total, loss: stage("recovering", done, total),
                    **self.how,
                )
                write_json(folder / RECOVERY, recovered.to_dict())
                lap("recover")
            elif self.study.file.keep_checkpoints:
                shutil.copytree(pruned, folder / CHECKPOINT)
            scored = open_model(str(result), dtype=self._dtype, **self.how)
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
            del scored  # before its files
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
                "device": self._device,
            }
            scores.save(folder / TRIAL_SCORES)
            record = {"trial": outcome.model_dump(mode="json"), "run": run, "dense": self._key}
            write_json(folder / RESULT, record)
        return outcome

    def _prune(
        self, trial: Planned, progress: Callable[[int, int], None]
    ) -> tuple[PruneReport, Path]:
        """Prune a trial's model, unless the last trial's was pruned in the same way; return the
        report and the checkpoint."""
        if self._pruned is None or self._pruned[0] != trial.pruned:
            self.close()
            request = trial.request
            if trial.calibration_id is not None:  # drawn before
                options = request.model_dump(exclude=set(DrawOptions.model_fields))
                request = PruneRequest(**options | {"calibration": self._set(trial)})
            entry, output = self.study.file.models[trial.model], self.store.pruned(trial.id)
            how = self.how | {"dtype": entry.dtype, "resume": True, "progress": progress}
            report = prune_checkpoint(entry.name, output, request, **how)
            self._pruned = trial.pruned, report, output
        return self._pruned[1:]

    def _set(self, trial: Planned) -> str:
        """Return the folder of a trial's calibration set, as text."""
        return str(self.store.calibration(trial.calibration_id or ""))

    def _draw(self, trial: Planned, stage: Tick, note: Callable[[str], None]) -> None:
        """Make a trial's calibration set with the dense model, unless the store has it."""
        if trial.calibration_id is None:
            return
        folder = self.store.calibration(trial.calibration_id)
        with self.store.lock(f"set-{trial.calibration_id}"):
            if not folder.is_dir():
                stage("calibration set", 0, 1)
                request = trial.request
                drawing = trial.parsed or parse_calibration(
                    request.calibration or "", sources=self.study.own, **request.drawn()
                )
                opened = self._dense_model(trial.model)
                calibration_set(drawing, opened, writing=stage, note=note).save(folder)
