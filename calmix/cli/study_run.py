"""`study init, validate, plan, run, status, export`: write a study file, check it, run it."""

from __future__ import annotations

from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from calmix.cli.common import duration, err, out, print_json, size
from calmix.cli.tables import print_rows
from calmix.cli.verbs import verb
from calmix.errors import InputError
from calmix.files import check_output_file, write_text
from calmix.options import Options, option, path_option

if TYPE_CHECKING:
    from calmix.analysis.power import Reach
    from calmix.study.results import Trial
    from calmix.study.running import Execute, Observer
    from calmix.study.spec import Study
    from calmix.study.trials import Resolved
else:  # torch is imported once a verb needs it
    Observer = object


class OfFile(Options):
    """Options of what reads a study file."""

    study: Path = option(..., "A study's .yaml file.", argument=True, metavar="STUDY")
    as_json: bool = option(False, "Print JSON instead of a table.", flag="--json")


class OfStore(Options):
    """Options of what reads a store."""

    store: Path = option(..., "A study's results folder.", argument=True, metavar="STORE")
    as_json: bool = option(False, "Print JSON instead of a table.", flag="--json")


class InitOptions(Options):
    """Options of `study init`."""

    study: Path = option(..., "The .yaml file to write.", argument=True, metavar="STUDY")
    overwrite: bool = option(False, "Replace the file if it exists.")


class PlanOptions(OfFile):
    """Options of `study plan`."""

    device: str = option("auto", "Torch device to plan for, e.g. cuda:1.")
    power: Path | None = option(
        None, "An earlier study, whose noise says what seeds resolve.", metavar="STUDY"
    )


class RunOptions(OfFile):
    """Options of `study run`."""

    store: Path = option(..., "Folder that keeps the results.", flag="--store -o", metavar="STORE")
    only: list[str] = option(
        [], "Only trials whose set, model or label matches, e.g. 'mix*'.", metavar="PATTERN"
    )
    skip: list[str] = option([], "Not these trials (repeat).", metavar="PATTERN")
    retry_failed: bool = option(False, "Run failed trials again.")
    reuse: list[Path] = option(
        [], "Another study's store to copy shared results from (repeat).", metavar="STORE"
    )
    executor: Literal["local", "ray"] = option("local", "In this process, or on a Ray cluster.")
    address: str | None = option(
        None, "Ray cluster: auto, HOST:PORT or ray://HOST:PORT.", shown="one on this machine",
        advanced=True,
    )  # fmt: skip
    workers: int | None = option(
        None, "Ray: trials at a time.", shown="as many as fit", ge=1, advanced=True
    )
    cpus: float | None = option(None, "Ray: CPUs per trial.", shown="1", gt=0, advanced=True)
    gpus: float | None = option(
        None, "Ray: GPUs per trial.", shown="1 if there are any", ge=0, advanced=True
    )
    retries: int | None = option(
        None, "Ray: restarts of a trial whose worker died.", shown="2", ge=0, advanced=True
    )
    device: str = option("auto", "Torch device, e.g. cpu or cuda:1.")
    trust_remote_code: bool = option(False, "Run modelling code shipped with the model.")
    allow_code_execution: bool = option(
        False, "Run code the models write, in a limited subprocess."
    )


class ExportOptions(Options):
    """Options of `study export`."""

    store: Path = option(..., "A study's results folder.", argument=True, metavar="STORE")
    output: Path = path_option("Folder to write to.")


def register(study: typer.Typer) -> None:
    """Add the verbs to the sub-command."""
    for act in (init, validate, plan, run, status, export):
        verb(study, act.__name__)(act)


def init(options: InitOptions) -> None:
    """Write a commented study file to start from."""
    path = options.study
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"name a .yaml file for the study, not {path}")
    check_output_file(path, overwrite=options.overwrite)
    template = resources.files("calmix.study").joinpath("template.yaml")
    write_text(path, template.read_text(encoding="utf-8"))
    _note(f"wrote {path}: calmix study validate {path}")


def validate(options: OfFile) -> None:
    """Check a study file and list every mistake with its line."""
    from calmix.study.spec import check_study
    from calmix.study.trials import plan

    path = options.study
    checked = check_study(path)
    trials = plan(checked.study) if checked.study is not None else []
    if options.as_json:
        print_json({"problems": checked.problems, "trials": [trial.label for trial in trials]})
    for problem in checked.problems:
        if not options.as_json:
            _say(problem)
    if checked.study is None:
        count = len(checked.problems)
        raise InputError(f"{path} has {count} mistake{'s' if count > 1 else ''}")
    if not options.as_json:
        sets = len({trial.calibration for trial in trials if trial.rows})
        _say(f"{path}: {len(trials)} trials over {sets} calibration sets")


def plan(options: PlanOptions) -> None:
    """Estimate trials, time, memory and disk before anything runs."""
    from calmix.study.estimate import estimate
    from calmix.study.spec import load_study

    study = load_study(options.study)
    reached = [] if options.power is None else _reach(study, options.power)
    found = estimate(study, options.device)
    if options.as_json:
        power = {} if options.power is None else {"power": [asdict(one) for one in reached]}
        print_json({"study": study.name, **asdict(found), **power})
        return
    late = any("recover" in group.seconds for group in found.groups)
    rows = [
        ({"model": group.model} if len(study.models) > 1 else {})
        | {
            "trials": group.trials,
            "method": group.method,
            "pattern": group.pattern,
            "tokens": f"{group.rows}x{group.length}" if group.rows else "-",
            "prune": duration(group.seconds["prune"]),
        }
        | ({"recover": duration(r) if (r := group.seconds.get("recover")) else "-"} if late else {})
        | {
            "evaluate": duration(group.seconds["evaluate"]),
            "memory": size(group.memory),
            "disk": size(group.disk),
        }
        for group in found.groups
    ]
    print_rows(
        rows, as_json=False, title=f"study {study.name}, each trial",
        least=["disk", "memory", "tokens", "model"],
    )  # fmt: skip
    _say(
        f"{found.trials} trials, {found.sets} calibration sets "
        f"({duration(found.sets_seconds)} to make and measure), dense scores "
        f"({duration(found.dense_seconds)}): {duration(found.seconds)} in all, one trial at a "
        f"time; at most {size(found.memory)} of memory, {size(found.disk)} on disk"
    )
    for note in found.notes:
        _say(f"note: {note}")
    if reached:
        points = [
            {
                "condition": one.condition, "draws": one.draws,
                "these items": _points(one.on_these), "other items too": _points(one.with_items),
            }
            for one in reached
        ]  # fmt: skip
        title = "differences of totals that 80 % of studies detect, in points (-: unknown)"
        print_rows(points, as_json=False, title=title)


def _points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _reach(study: Study, earlier: Path) -> list[Reach]:
    from calmix.analysis.power import reach
    from calmix.study.export import read_results
    from calmix.study.trials import plan

    results = read_results(earlier)
    if results.suite.get("hash") != study.suite.hash:
        raise InputError(
            f"the noise in {earlier} is of another suite ({results.suite.get('name')}) or version "
            f"of it: this study has {study.suite.name}"
        )
    return reach(plan(study), results)


def run(options: RunOptions) -> None:
    """Run what is left of a study; if interrupted, run the same command again to resume."""
    from calmix.study.bench import Options as How
    from calmix.study.running import run_study
    from calmix.study.spec import load_study

    execute = _executor(options)
    study = load_study(options.study)
    how = How(options.device, options.trust_remote_code, options.allow_code_execution)
    with Watch() as watch:
        store, outcome = run_study(
            study, options.store, watch, options=how, only=options.only, skip=options.skip,
            retry_failed=options.retry_failed, reuse=options.reuse, execute=execute,
        )  # fmt: skip
    states = [store.state(entry.id) for entry in store.entries]
    done = states.count("finished")
    if options.as_json:
        print_json(
            {"store": str(options.store), "planned": len(states), "finished": done,
             "failed": outcome.failed, "elsewhere": outcome.elsewhere}
        )  # fmt: skip
    else:
        _say(f"{done} of {len(states)} trials finished: {options.store}")
    for label, who in outcome.elsewhere.items():
        _note(f"left to {who}: {label}")
    if outcome.failed:
        label, error = next(iter(outcome.failed.items()))
        raise InputError(
            f"{len(outcome.failed)} trials failed, first '{label}' ({error}): correct the cause "
            "and run again with --retry-failed"
        )


def _executor(options: RunOptions) -> Execute | None:
    """Return what runs the trials; None for this process."""
    names = ("address", "workers", "cpus", "gpus", "retries")
    given = {key: value for key in names if (value := getattr(options, key)) is not None}
    if options.executor == "ray":
        from calmix.study.cluster import on_ray

        return on_ray(**given)
    if given:
        raise InputError(f"--{next(iter(given))} has no effect without --executor ray")
    return None


def status(options: OfStore) -> None:
    """Show how far a study is: finished, running, failed and still to run."""
    from calmix.study.store import open_store

    store = open_store(options.store)
    rows, seconds = [], []
    for entry in store.entries:
        state, note = store.state(entry.id), ""
        if state == "failed":
            note = store.read_failure(entry.id).error
        elif state == "running":
            note = store.runner(entry.id) or ""
        elif state == "finished":
            found = store.result(entry.id).trial
            seconds.append(found.seconds.get("total", 0.0))
            note = f"{outcome_line(found)}, {seconds[-1]:.0f} s"
        rows.append({"trial": entry.label, "state": state, "note": note})
    states = [row["state"] for row in rows]
    counts = {name: states.count(name) for name in ("finished", "running", "failed", "pending")}
    left = counts["running"] + counts["pending"]
    ahead = sum(seconds) / len(seconds) * left if seconds else None
    name = store.index.name
    if options.as_json:
        print_json({"study": name, **counts, "seconds_left": ahead, "trials": rows})
        return
    print_rows(rows, as_json=False, title=f"study {name}", text=["trial", "note"], least=[])
    line = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    _say(line + (f"; {duration(ahead)} of work left" if left and ahead is not None else ""))


def export(options: ExportOptions) -> None:
    """Write the results to a folder that needs no store: study.json and the table."""
    from calmix.study.export import export_results

    for path in export_results(options.store, options.output):
        _note(f"wrote {path}")


def outcome_line(trial: Trial) -> str:
    """Return a trial's total and worst retention in a few words."""
    if trial.total.value is None:
        return "no retention"
    found = f"total {100 * trial.total.value:.1f} %"
    if trial.worst is None:
        return found
    return f"{found}, worst {trial.worst} {100 * (trial.dimensions[trial.worst].value or 0):.1f} %"


class Watch(Observer):
    """The observer of a run: a bar on a terminal, and a line for every trial that ends."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._total = self._ended = 0
        self._seconds: list[float] = []
        self._job = self._bar.add_task("reading the study", total=None, left="")

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def begin(self, todo: int, planned: int) -> None:
        """Show how much there is to do."""
        self._total = todo
        if todo < planned:
            self.note(f"{todo} of {planned} trials to run")

    def started(self, trial: Resolved) -> None:
        """Show which trial runs."""
        self.stage(trial, "", 0, 1)

    def stage(self, trial: Resolved, what: str, done: int, total: int) -> None:
        """Show what a trial does."""
        named = f"trial {self._ended + 1} of {self._total}: {trial.planned.label} {what}"
        mean = sum(self._seconds) / max(1, len(self._seconds))
        left = f"{duration(mean * (self._total - self._ended))} left" if self._seconds else ""
        self._bar.update(
            self._job, description=named.rstrip(), completed=done, total=total, left=left
        )

    def finished(self, trial: Resolved, outcome: Trial) -> None:
        """Show what a trial has found."""
        self._seconds.append(outcome.seconds.get("total", 0.0))
        self._end(trial, f"{outcome_line(outcome)}, {self._seconds[-1]:.0f} s")

    def failed(self, trial: Resolved, error: str) -> None:
        """Show why a trial has failed."""
        self._end(trial, f"failed: {error}")

    def _end(self, trial: Resolved, line: str) -> None:
        self._ended += 1
        self.note(f"{self._ended}/{self._total} {trial.planned.label}: {line}")

    def note(self, text: str) -> None:
        """Show a line."""
        self._bar.console.print(text, soft_wrap=True, highlight=False, markup=False)


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)


def _note(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False, markup=False)
