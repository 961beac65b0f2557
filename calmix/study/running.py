"""Run a study: what is left of its trials, one after another here or spread over a cluster."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from calmix.capability.evaluate import check_code
from calmix.errors import CalmixError, DiskError, InputError
from calmix.files import check_free
from calmix.models.opening import check_models, device_of
from calmix.study.bench import Bench
from calmix.study.export import read_results, write_tables
from calmix.study.planning import check_allocations, check_memory
from calmix.study.results import Trial
from calmix.study.spec import Study
from calmix.study.store import Store, check_folder, claim_store, is_store, open_store
from calmix.study.trials import Planned, Resolved, Resolver, plan


class Observer(Protocol):
    """Who is told how a run goes on."""

    def begin(self, todo: int, planned: int) -> None:
        """The run begins: trials to run, and all that the study asks for."""

    def started(self, trial: Resolved) -> None:
        """A trial begins."""

    def stage(self, trial: Resolved, what: str, done: int, total: int) -> None:
        """A trial does something, so far `done` of `total`."""

    def finished(self, trial: Resolved, outcome: Trial) -> None:
        """A trial has finished."""

    def failed(self, trial: Resolved, error: str) -> None:
        """A trial has failed."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True)
class Options:
    """How trials are run; none of it decides what they find.

    Attributes:
        device: torch device, or `auto`.
        trust_remote_code: run modelling code shipped with a model.
        allow_code_execution: run code the models write, in a limited subprocess.
    """

    device: str = "auto"
    trust_remote_code: bool = False
    allow_code_execution: bool = False

    def bench(self, study: Study, store: Store) -> Bench:
        """Return a bench for this process."""
        return Bench(
            study,
            store,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            allow_code_execution=self.allow_code_execution,
        )


@dataclass
class Outcome:
    """What a run did: finished, failed and left to other runners, by label."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)


Execute = Callable[[Study, Store, Sequence[Resolved], Options, Observer], Outcome]


def run_study(
    study: Study,
    path: Path,
    observer: Observer,
    *,
    options: Options | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    retry_failed: bool = False,
    reuse: Sequence[Path] = (),
    execute: Execute | None = None,
) -> tuple[Store, Outcome]:
    """Run what is left of a study and keep it in the store at `path`.

    Finished trials are not run again, failed ones on request.

    Args:
        study: the study.
        path: the store's folder, made if there is none.
        observer: told what happens.
        options: how trials are run.
        only, skip: run only, or leave out, trials whose calibration or label matches one of
            these patterns (`*` stands for anything).
        retry_failed: run failed trials again.
        reuse: stores of other studies: their trials and sets that are asked for here too are
            copied and not made again.
        execute: runs the trials; one at a time in this process if not given.

    Raises:
        InputError: nothing matches, code execution is needed and not allowed, sparsities by
            layer do not fit a model, or the store is no store or holds finished trials of a
            changed study.
        ModelError: a model cannot be opened.
    """
    options = options or Options()
    check_folder(path, study.files)
    check_code(study.suite, options.allow_code_execution)
    others = [open_store(other) for other in reuse]
    planned = plan(study)
    wanted_trials = chosen_trials(planned, only, skip)
    if execute is None:  # a cluster has devices of its own
        device_of(options.device)
    names = (model.name for model in study.models.values())
    check_models(*names, trust_remote_code=options.trust_remote_code)
    resolver = Resolver(study)
    resolved = [resolver.resolve(trial) for trial in planned]
    labels: dict[str, str] = {}
    for trial in resolved:
        first = labels.setdefault(trial.id, trial.planned.label)
        if first != trial.planned.label:
            raise InputError(
                f"'{first}' and '{trial.planned.label}' are the same trial: name it once"
            )
    check_allocations(study, wanted_trials, trust_remote_code=options.trust_remote_code)
    chosen = {trial.key for trial in wanted_trials}
    done = open_store(path) if is_store(path) else None
    left = [t.planned for t in resolved if t.planned.key in chosen
            and (done is None or done.state(t.id) != "finished")]  # fmt: skip
    check_free(path, resolver.checkpoint_bytes(left), "checkpoints take")
    store = claim_store(path, study, resolved)
    for other in others:
        if taken := store.take(other):
            observer.note(f"{taken} trials were taken from {other.path}")
    wanted = ("pending", "running", "failed") if retry_failed else ("pending", "running")
    todo = [t for t in resolved if t.planned.key in chosen and store.state(t.id) in wanted]
    observer.begin(len(todo), len(resolved))
    outcome = (execute or run_locally)(study, store, todo, options, observer)
    store.sweep()
    for note in mixed_notes(store):
        observer.note(note)
    write_tables(read_results(path), path)
    return store, outcome


def chosen_trials(
    trials: Sequence[Planned], only: Sequence[str], skip: Sequence[str]
) -> list[Planned]:
    """Return the trials that patterns choose.

    Raises:
        InputError: a pattern matches none, or nothing is left.
    """

    def matches(trial: Planned, pattern: str) -> bool:
        names = (trial.model, trial.calibration, trial.label)
        return any(fnmatchcase(name, pattern) for name in names)

    for pattern in [*only, *skip]:
        if not any(matches(trial, pattern) for trial in trials):
            known = [", ".join(dict.fromkeys(getattr(trial, of) for trial in trials))
                     for of in ("calibration", "model")]  # fmt: skip
            raise InputError(
                f"no trial matches '{pattern}' (calibrations: {known[0]}; models: {known[1]})"
            )
    kept = [
        trial
        for trial in trials
        if (not only or any(matches(trial, pattern) for pattern in only))
        and not any(matches(trial, pattern) for pattern in skip)
    ]
    if not kept:
        raise InputError("--only and --skip together leave no trial")
    return kept


def run_locally(
    study: Study, store: Store, todo: Sequence[Resolved], options: Options, observer: Observer
) -> Outcome:
    """Run trials one after another in this process.

    A trial that another runner is at work on is left to it.

    Raises:
        InputError: the device cannot hold one of them.
    """
    check_memory(study, [trial.planned for trial in todo], device_of(options.device))
    return run_on(options.bench(study, store), store, todo, observer)


def run_on(bench: Bench, store: Store, todo: Sequence[Resolved], observer: Observer) -> Outcome:
    """Run trials one after another on a bench, as `run_locally`."""
    outcome = Outcome()
    for trial in todo:
        run_one(bench, store, trial, observer, outcome)
    # What others were at work on may have been given up meanwhile.
    for trial in todo:
        if trial.planned.label in outcome.elsewhere and store.state(trial.id) == "pending":
            del outcome.elsewhere[trial.planned.label]
            run_one(bench, store, trial, observer, outcome)
    return outcome


def run_one(
    bench: Bench, store: Store, trial: Resolved, observer: Observer, outcome: Outcome
) -> None:
    """Run one trial under its lock and keep what comes of it, a failure too."""
    label = trial.planned.label
    lock = store.lock(trial.id)
    if not lock.acquire():
        outcome.elsewhere[label] = store.runner(trial.id) or "another runner"
        return
    try:
        if store.state(trial.id) == "finished":  # by another runner, a moment ago
            return
        for left in (store.path / "trials").glob(f".{trial.id}.*"):
            shutil.rmtree(left, ignore_errors=True)
        observer.started(trial)
        # A model that does not open or cannot be scored fails every trial alike.
        bench.open(trial.planned.model)
        bench.dense(lambda *of: observer.stage(trial, *of))
        try:
            found = bench.run(trial, lambda *of: observer.stage(trial, *of))
        except DiskError:
            raise
        except CalmixError as error:
            _failed(store, trial, str(error), observer, outcome)
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "")
            _failed(store, trial, f"{type(error).__name__}: {line}", observer, outcome)
        else:
            outcome.finished.append(label)
            observer.finished(trial, found)
    finally:
        lock.release()


def _failed(
    store: Store, trial: Resolved, error: str, observer: Observer, outcome: Outcome
) -> None:
    error = " ".join(error.split())
    store.fail(trial, error, traceback.format_exc())
    outcome.failed[trial.planned.label] = error
    observer.failed(trial, error)


def mixed_notes(store: Store) -> list[str]:
    """Return a line for each thing that differs between runs of finished trials and can move
    their figures: package versions, dtype, device, threads."""
    seen: dict[str, set[str]] = {}
    for entry in store.entries:
        if store.state(entry["id"]) != "finished":
            continue
        run = store.result(entry["id"])["run"]
        facts = {**run["versions"], **{key: run[key] for key in ("dtype", "device", "threads")}}
        for key, value in facts.items():
            seen.setdefault(key, set()).add(str(value))
    return [
        f"finished trials were computed with different {key} ({', '.join(sorted(values))}): "
        "their figures may differ by rounding or more"
        for key, values in seen.items()
        if len(values) > 1
    ]
