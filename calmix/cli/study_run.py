"""`study init, validate, plan, run, status`: write a study file, check it, run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from calmix.cli.common import AsJson, Device, TrustRemoteCode, err, out, print_json
from calmix.errors import InputError

if TYPE_CHECKING:
    from calmix.study.results import Trial
    from calmix.study.trials import Resolved

StudyPath = Annotated[
    Path, typer.Argument(metavar="STUDY", show_default=False, help="A study's .yaml file.")
]
StorePath = Annotated[
    Path,
    typer.Option("--store", "-o", show_default=False, help="Folder that keeps the results."),
]


def register(study: typer.Typer) -> None:
    """Add the verbs to the sub-command."""
    study.command("run")(run_command)


def run_command(
    path: StudyPath,
    store: StorePath,
    only: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            metavar="PATTERN",
            help="Only trials whose calibration or label matches, such as 'mix*' (repeat).",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(show_default=False, metavar="PATTERN", help="Not these (repeat)."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run trials that failed once more.")
    ] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run code the models write, in a limited subprocess."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run what is left of a study; stop it whenever you like and run it again."""
    from calmix.study.running import Options, run_study
    from calmix.study.spec import load_study

    study = load_study(path)
    options = Options(device, trust_remote_code, allow_code_execution)
    with Watch() as watch:
        kept, outcome = run_study(
            study,
            store,
            watch,
            options=options,
            only=only or (),
            skip=skip or (),
            retry_failed=retry_failed,
        )
    states = [kept.state(entry["id"]) for entry in kept.entries]
    told = {
        "store": str(store),
        "planned": len(states),
        "finished": states.count("finished"),
        "failed": outcome.failed,
        "elsewhere": outcome.elsewhere,
    }
    if as_json:
        print_json(told)
    else:
        out.print(
            f"{told['finished']} of {told['planned']} trials finished: {store}",
            soft_wrap=True,
            highlight=False,
        )
    for label, who in outcome.elsewhere.items():
        err.print(f"left to {who}: {label}", soft_wrap=True, highlight=False, markup=False)
    if outcome.failed:
        label, error = next(iter(outcome.failed.items()))
        raise InputError(
            f"{len(outcome.failed)} trials failed, first '{label}' ({error}): mend the cause and "
            "run again with --retry-failed"
        )


class Watch:
    """Shows how a run goes on: a bar on a terminal, and a line for every trial that ends."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._total = self._planned = self._ended = 0
        self._seconds: list[float] = []
        self._running: set[str] = set()
        self._job = self._bar.add_task("reading the study", total=None, left="")

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def begin(self, todo: int, planned: int) -> None:
        """Show how much there is to do."""
        self._total, self._planned = todo, planned
        if todo < planned:
            self._line(f"{todo} of {planned} trials to run")

    def started(self, trial: Resolved) -> None:
        """Show which trial runs."""
        self._running.add(trial.id)
        self.stage(trial, "", 0, 1)

    def stage(self, trial: Resolved, what: str, done: int, total: int) -> None:
        """Show what a trial does."""
        number = self._ended + 1
        self._bar.update(
            self._job,
            description=f"trial {number} of {self._total}: {trial.planned.label} {what}".rstrip(),
            completed=done,
            total=total,
            left=self._left(),
        )

    def finished(self, trial: Resolved, outcome: Trial) -> None:
        """Show what a trial has found."""
        self._ended += 1
        self._running.discard(trial.id)
        self._seconds.append(outcome.seconds.get("total", 0.0))
        total, worst = outcome.total.value, outcome.worst
        found = "no retention" if total is None else f"total {100 * total:.1f} %"
        if worst is not None:
            found += f", worst {worst} {100 * (outcome.dimensions[worst].value or 0):.1f} %"
        self._line(f"{self._count()} {trial.planned.label}: {found}, {self._seconds[-1]:.0f} s")

    def failed(self, trial: Resolved, error: str) -> None:
        """Show why a trial has failed."""
        self._ended += 1
        self._running.discard(trial.id)
        self._line(f"{self._count()} {trial.planned.label}: failed: {error}")

    def note(self, text: str) -> None:
        """Show a line."""
        self._line(text)

    def _count(self) -> str:
        return f"{self._ended}/{self._total}"

    def _left(self) -> str:
        if not self._seconds:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        return f"{duration(mean * (self._total - self._ended))} left"

    def _line(self, text: str) -> None:
        self._bar.console.print(text, soft_wrap=True, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Return a time in words: `40 s`, `12 min`, `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
