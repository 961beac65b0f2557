"""Run a study: what is left of its trials, here or by several workers on one store."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import Timeout

from calmix.errors import CalmixError, DiskError, InputError, first_line
from calmix.evaluation.evaluate import check_code
from calmix.files import check_free
from calmix.models.opening import check_models, device_of
from calmix.options import TrialOptions
from calmix.study.bench import Bench
from calmix.study.estimate import check_memory
from calmix.study.export import KEYS, MIXED, read_results, write_table
from calmix.study.spec import Study
from calmix.study.store import RESULT, Store, check_folder, claim_store, is_store, open_store
from calmix.study.trials import Planned, Resolved, checkpoint_bytes, plan, resolve_all


class Observer:
    """Is told how a run goes; this one ignores it.

    `begin(todo, planned)`, `note(text)`, and of a trial `started(trial)`, `stage(trial, what, done,
    total)`, `finished(trial, outcome)` and `failed(trial, error)`.
    """

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda *_: None


@dataclass
class Outcome:
    """What a run did not finish: trials that failed or are left to other processes, by label."""

    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)

    def add(self, trial: Resolved, ended: Ended, observer: Observer) -> None:
        """Take what came of a trial, and tell the observer."""
        (how, what), label = ended, trial.planned.label
        self.elsewhere.pop(label, None)
        if how == "finished":
            observer.finished(trial, what)
        elif how == "failed":
            self.failed[label] = what
            observer.failed(trial, what)
        elif how == "elsewhere":
            self.elsewhere[label] = what


# `finished` with the trial, `failed` with the error, or left to what runs it `elsewhere`.
Ended = tuple[str, Any]
Execute = Callable[[Study, Store, Sequence[Resolved], TrialOptions, Observer], Outcome]


def run_study(
    study: Study,
    path: Path,
    observer: Observer,
    *,
    options: TrialOptions | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    retry_failed: bool = False,
    execute: Execute | None = None,
) -> tuple[Store, Outcome]:
    """Run what is left of a study and keep it in the store at `path`."""
    options = options or TrialOptions()
    check_folder(path, study.files)
    check_code(study.suite, options.allow_code_execution)
    planned = plan(study)
    wanted = chosen_trials(planned, only, skip)
    if execute is None:  # a cluster has devices of its own
        device_of(options.device)
    models = (model.name for model in study.file.models.values())
    check_models(*models, trust_remote_code=options.trust_remote_code)
    resolved = resolve_all(study, planned)
    names: dict[str, str] = {}
    for trial in resolved:
        first, own = names.setdefault(trial.id, trial.planned.label), trial.planned.label
        if first != own:
            raise InputError(f"'{first}' and '{own}' are the same trial: name it once")
    chosen = {trial.key for trial in wanted}
    done = open_store(path) if is_store(path) else None
    left = [t.planned for t in resolved if t.planned.key in chosen
            and (done is None or done.state(t.id) != "finished")]  # fmt: skip
    check_free(path, checkpoint_bytes(study, left), "checkpoints take")
    store = claim_store(path, study, resolved)
    states = ("pending", "running", "failed") if retry_failed else ("pending", "running")
    todo = [t for t in resolved if t.planned.key in chosen and store.state(t.id) in states]
    observer.begin(len(todo), len(resolved))
    outcome = (execute or run_locally)(study, store, todo, options, observer)
    results = read_results(path)
    found = dict(results.environment)
    facts = found.pop("versions", {}) | {key: found.get(key) for key in KEYS[2:]}
    for key, value in facts.items():
        if MIXED in str(value):
            observer.note(
                f"finished trials were computed with different {key} ({value}): their figures may "
                "differ by rounding or more"
            )
    write_table(results, path)
    return store, outcome


def chosen_trials(
    trials: Sequence[Planned], only: Sequence[str], skip: Sequence[str]
) -> list[Planned]:
    """Return the trials that patterns choose."""

    def matches(trial: Planned, patterns: Sequence[str]) -> bool:
        names = (trial.model, trial.calibration, trial.label)
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    for pattern in [*only, *skip]:
        if not any(matches(trial, [pattern]) for trial in trials):
            known = [", ".join(dict.fromkeys(getattr(trial, of) for trial in trials))
                     for of in ("calibration", "model")]  # fmt: skip
            raise InputError(
                f"no trial matches '{pattern}' (calibrations: {known[0]}; models: {known[1]})"
            )
    kept = [t for t in trials if (not only or matches(t, only)) and not matches(t, skip)]
    if not kept:
        raise InputError("--only and --skip together leave no trial")
    return kept


def run_locally(
    study: Study, store: Store, todo: Sequence[Resolved], how: TrialOptions, observer: Observer
) -> Outcome:
    """Run trials one after another in this process; what another one runs is left to it."""
    check_memory(study, [trial.planned for trial in todo], device_of(how.device))
    bench, outcome = Bench(study, store, how), Outcome()
    for trial in todo:
        outcome.add(trial, run_one(bench, trial, observer), observer)
    for trial in todo:  # what others ran may have been given up meanwhile
        if trial.planned.label in outcome.elsewhere and store.state(trial.id) == "pending":
            outcome.add(trial, run_one(bench, trial, observer), observer)
    return outcome


def run_one(bench: Bench, trial: Resolved, observer: Observer) -> Ended:
    """Run one trial under its lock and keep what comes of it, a failure too."""
    store = bench.store

    def stage(what: str, done: int, total: int) -> None:
        observer.stage(trial, what, done, total)

    try:
        with store.lock(trial.id).acquire(timeout=0):
            if (store.trial(trial.id) / RESULT).is_file():  # finished a moment ago
                return "", None
            observer.started(trial)
            # A model that does not open or cannot be scored fails every trial alike.
            bench.ready(trial.planned.model, stage)
            try:
                return "finished", bench.run(trial, stage)
            except DiskError:
                raise
            except Exception as error:
                line = " ".join(str(error).split())
                if not isinstance(error, CalmixError):
                    line = f"{type(error).__name__}: {first_line(error)}"
                store.fail(trial, line, traceback.format_exc())
                return "failed", line
    except Timeout:
        return "elsewhere", store.runner(trial.id) or "another process"
