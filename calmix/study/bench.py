"""The bench: where one process runs trials, with an open model and what the trials share.

Before a prune the dense weights are put back from a copy in memory: reading them again would
cost more than the prune's own set-up. What the trial before left pruned just so, and only the
recovery differs, is not pruned again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from calmix.calibration import CalibrationSet, resolve
from calmix.calibration.measuring import distortion, measure_set
from calmix.capability.distance import Reference, distance, reference
from calmix.capability.evaluate import SCORER, evaluate
from calmix.capability.retention import Estimate, Retention
from calmix.capability.scores import CapabilityScores, load_scores
from calmix.capability.texts import Texts, builtin_readers, texts
from calmix.errors import InputError
from calmix.files import hidden, sha256_json, write_json
from calmix.manifest import run_record, versions
from calmix.models import OpenModel, find_blocks, open_model
from calmix.pruning import PruneReport, allocate, prune
from calmix.pruning.allocation import from_shares
from calmix.pruning.engine import Patterns
from calmix.pruning.methods import get_method
from calmix.recovery.distill import trained_names
from calmix.specs import recovery_of
from calmix.study.results import Interval, TaskOutcome, Trial
from calmix.study.spec import Study, as_pattern
from calmix.study.store import RESULT, SCORES, Store, publish
from calmix.study.trials import Key, Planned, Resolved, halves_of, kind_of

if TYPE_CHECKING:
    from torch import Tensor

INFORMATION, PRUNING, RECOVERY = "information.json", "pruning.json", "recovery.json"
CHECKPOINT = "checkpoint"

Stage = Callable[[str, int, int], None]  # what is done now; how much of it, out of how much


class Bench:
    """Runs trials of a study one after another in this process.

    Args:
        study: whose trials they are.
        store: where results and shared parts lie.
        device: torch device, or `auto`.
        trust_remote_code: run modelling code shipped with a model.
        allow_code_execution: run code the models write, in a limited subprocess.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        *,
        device: str = "auto",
        trust_remote_code: bool = False,
        allow_code_execution: bool = False,
    ) -> None:
        self.study = study
        self.store = store
        self.device = device
        self.trust_remote_code = trust_remote_code
        self.allow_code_execution = allow_code_execution
        self._label: str | None = None
        self._opened: OpenModel | None = None
        self._dense_weights: dict[str, Tensor] = {}
        self._changed = False  # whether the open model's weights are no longer the dense ones
        self._pruned: tuple[Key, PruneReport] | None = None  # what its weights are now
        self._scores: CapabilityScores | None = None
        self._texts: Texts = {}
        self._reference: Reference | None = None
        self._set: tuple[str, CalibrationSet, dict[str, float]] | None = None

    def run(self, trial: Resolved, stage: Stage | None = None) -> Trial:
        """Run one trial, write it to the store and return it.

        Raises:
            CalmixError: anything a user can mend; nothing is written then.
        """
        stage = stage or (lambda what, done, total: None)
        planned = trial.planned
        began = time.perf_counter()
        seconds: dict[str, float] = {}

        def timed(name: str, since: float) -> float:
            now = time.perf_counter()
            seconds[name] = round(now - since, 3)
            return now

        opened = self.open(planned.model, stage)
        at = timed("open", began)
        dense = self.dense(stage)
        at = timed("dense", at)
        made: CalibrationSet | None = None
        information: dict[str, float] = {}
        if trial.calibration_id is not None:
            made, information = self._calibration(trial, opened, stage)
        at = timed("calibration", at)
        report = self._prune(planned, opened, made, lambda *of: stage("pruning", *of))
        at = timed("prune", at)
        with self.store.writing(trial) as folder:
            write_json(folder / PRUNING, report.to_json())
            if planned.recovery is not None:
                self._recover(trial, opened, report, made, folder, stage)
                at = timed("recover", at)
            elif self.study.file.keep_checkpoints:
                self._keep(opened, report, made, folder / CHECKPOINT)
            scores = evaluate(
                opened,
                self.study.suite,
                allow_code_execution=self.allow_code_execution,
                floors=False,
                progress=lambda *of: stage("scoring", *of),
            )
            if self._reference is not None:
                found = distance(opened, self._reference, self._texts,
                                 progress=lambda *of: stage("distance", *of))  # fmt: skip
                scores = replace(scores, distance=found.to_dict())
            at = timed("evaluate", at)
            kept = scores.retention(dense)
            timed("retention", at)
            timed("total", began)
            outcome = describe(trial, self.study, information, kept, report.sparsity, seconds)
            run = run_record(seconds) | {
                "versions": versions() | scores.versions,
                "dtype": scores.dtype,
                "device": opened.model.device.type,
            }
            scores.save(folder / SCORES)
            record = {"trial": outcome.model_dump(mode="json"), "run": run}
            write_json(folder / RESULT, record | {"dense": self._dense_key()})
        return outcome

    def open(self, label: str, stage: Stage | None = None) -> OpenModel:
        """Return the model of a label, with the weights that the trial before left."""
        if self._opened is not None and self._label == label:
            return self._opened
        if stage is not None:
            stage("opening the model", 0, 1)
        self._opened, self._scores, self._set, self._dense_weights = None, None, None, {}
        self._reference = None
        entry = self.study.models[label]
        opened = open_model(
            entry.name,
            dtype=entry.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )
        self._opened, self._label = opened, label
        self._changed, self._pruned = False, None
        return opened

    def _restore(self) -> None:
        """Put the dense weights back, if others are in their place."""
        if self._changed:
            self._put(self._dense_weights)
        self._changed, self._pruned = False, None

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the open model."""
        assert self._opened is not None
        for name, value in weights.items():
            self._opened.model.get_parameter(name).data.copy_(value)

    def _recover(
        self,
        trial: Resolved,
        opened: OpenModel,
        report: PruneReport,
        made: CalibrationSet | None,
        folder: Path,
        stage: Stage,
    ) -> None:
        """Recover the pruned model, by files in the trial's folder; only the report stays there."""
        from calmix.recovery import recover

        planned = trial.planned
        assert planned.recovery is not None
        assert trial.calibration_id is not None
        held = str(self.store.calibration(trial.calibration_id))
        self._keep(opened, report, made, folder / "pruned")
        self._pruned = None
        recovered = recover(
            str(folder / "pruned"),
            self.study.models[planned.model].name,
            recovery_of(planned.recovery, held),
            folder / CHECKPOINT,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            progress=lambda done, total, loss: stage("recovering", done, total),
        )
        write_json(folder / RECOVERY, recovered.to_json())
        kind = str(opened.model.dtype).removeprefix("torch.")
        again = open_model(
            str(folder / CHECKPOINT), dtype=kind, device=self.device,
            trust_remote_code=self.trust_remote_code,
        ).model  # fmt: skip
        self._put({name: again.get_parameter(name).data for name in self._dense_weights})
        shutil.rmtree(folder / "pruned")
        if not self.study.file.keep_checkpoints:
            shutil.rmtree(folder / CHECKPOINT)

    def _keep(
        self, opened: OpenModel, report: PruneReport, made: CalibrationSet | None, folder: Path
    ) -> None:
        from calmix.pruning.checkpoint import check_space, write_checkpoint

        check_space(opened, folder)
        write_checkpoint(opened, folder, report, made)

    def _prune(
        self,
        planned: Planned,
        opened: OpenModel,
        made: CalibrationSet | None,
        progress: Callable[[int, int], None],
    ) -> PruneReport:
        """Prune the dense model, unless the trial before did just that and no more."""
        if self._pruned is not None and self._pruned[0] == planned.pruned:
            return self._pruned[1]
        self._restore()
        if not self._dense_weights:
            named = dict(opened.model.named_parameters())
            self._dense_weights = {
                name: named[name].to("cpu", copy=True)
                for name in trained_names(opened.model, find_blocks(opened.model))
            }
        pattern: Patterns = as_pattern(planned.target)
        if (shares := self.study.allocations.get(planned.allocation or "")) is not None:
            method = get_method(planned.method)
            pattern = from_shares(shares, find_blocks(opened.model), planned.sparsity, method)
        elif planned.allocation is not None:
            assert made is not None
            pattern = allocate(
                opened.model, made.ids, planned.sparsity, planned.allocation, method=planned.method
            )
        self._changed = True
        report = prune(
            opened.model,
            None if made is None else made.ids,
            method=planned.method,
            pattern=pattern,
            propagation="block" if planned.propagation == "block" else "sequential",
            progress=progress,
        )
        self._pruned = planned.pruned, report
        return report

    def dense(self, stage: Stage | None = None) -> CapabilityScores:
        """Return the scores of the open model before pruning, from the store if they are there."""
        if self._scores is not None:
            return self._scores
        opened, suite, key = self._opened, self.study.suite, self._dense_key()
        assert opened is not None
        path = self.store.dense(key)
        known = [name for name in suite.dimensions if name in builtin_readers()]
        if known and self._reference is None:
            self._restore()
            self._texts = texts(opened, dimensions=known)
            self._reference = reference(opened, self._texts, cache=True)
        lock = self.store.lock(f"dense-{key[:32]}")
        lock.wait()
        try:
            self._scores = _kept(path)
            if self._scores is None:
                self._restore()
                self._scores = evaluate(
                    opened,
                    suite,
                    allow_code_execution=self.allow_code_execution,
                    cache=True,
                    progress=lambda *of: stage("scoring the dense model", *of) if stage else None,
                )
                self._scores.save(path)
        finally:
            lock.release()
        return self._scores

    def _dense_key(self) -> str:
        """Return under which name the store keeps the open model's dense scores."""
        opened = self._opened
        assert opened is not None
        kind = [str(opened.model.dtype), opened.model.device.type, SCORER]
        files = [opened.fingerprint, opened.tokenizer_fingerprint]
        return sha256_json([*files, self.study.suite.hash, kind])

    def _calibration(
        self, trial: Resolved, opened: OpenModel, stage: Stage
    ) -> tuple[CalibrationSet, dict[str, float]]:
        """Return a trial's calibration set with its metrics, made if it is not in the store."""
        assert trial.calibration_id is not None
        if self._set is not None and self._set[0] == trial.calibration_id:
            return self._set[1:]
        folder = self.store.calibration(trial.calibration_id)
        lock = self.store.set_lock(trial.calibration_id)
        stage("calibration set", 0, 1)
        lock.wait()
        try:
            if not folder.is_dir():
                self._restore()
                self._make_set(trial.planned, opened, folder, stage)
            made = CalibrationSet.open(folder, opened)
            information = json.loads((folder / INFORMATION).read_text(encoding="utf-8"))
            if self.study.file.perplexity and "perplexity" not in information["metrics"]:
                stage("measuring the set", 0, 1)
                self._restore()
                found = distortion(opened, made)
                found["perplexity"] = found.pop("distortion")
                information["metrics"] |= found
                write_json(folder / INFORMATION, information)
        finally:
            lock.release()
        self._set = (trial.calibration_id, made, information["metrics"])
        return made, information["metrics"]

    def _make_set(self, planned: Planned, opened: OpenModel, folder: Path, stage: Stage) -> None:
        assert planned.draw is not None
        made = resolve(
            planned.draw.text, opened, sources=self.study.own, writing=stage, **planned.draw.options
        )
        values = measure_set(made, opened, perplexity=False)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hidden(folder) as beside:
            made.save(beside / "set")
            write_json(
                beside / "set" / INFORMATION, {"label": planned.calibration, "metrics": values}
            )
            publish(beside / "set", folder)


def _kept(path: Path) -> CapabilityScores | None:
    try:
        return load_scores(path)
    except InputError:  # none there, of an older format, or damaged: scored again
        return None


def describe(
    trial: Resolved,
    study: Study,
    information: dict[str, float],
    kept: Retention,
    sparsity: float,
    seconds: dict[str, float],
) -> Trial:
    """Return the record of a finished trial."""
    planned = trial.planned
    draw = planned.draw
    return Trial(
        id=trial.id,
        model=planned.model,
        calibration=planned.calibration,
        strategy=planned.strategy,
        kind=kind_of(planned, study),
        halves=halves_of(planned, study),
        mix=(trial.request["calibration"] or {}).get("mix", {}),
        method=planned.way,
        pattern=planned.pattern,
        sparsity=sparsity,
        propagation=planned.propagation,
        rows=0 if draw is None else draw.rows,
        length=0 if draw is None else draw.length,
        seed=planned.seed,
        suite=study.suite.name,
        information=information,
        total=_interval(kept.total),
        worst=kept.worst,
        dimensions={d.name: _interval(d.kept) for d in kept.dimensions},
        tasks=tuple(
            TaskOutcome(
                task=task.name,
                dimension=task.dimension,
                score=task.score,
                items=task.items,
                floor=task.floor,
                dense=task.dense,
                pruned=task.pruned,
                dense_accuracy=task.dense_accuracy,
                pruned_accuracy=task.pruned_accuracy,
                signal=task.signal,
                retention=_interval(task.kept),
            )
            for task in kept.tasks
        ),
        seconds=seconds,
    )


def _interval(value: Estimate) -> Interval:
    return Interval(**asdict(value))
