"""`study init, validate, plan, run, status`: write a study file, check it, run it."""

from __future__ import annotations

from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from calmix.cli.common import (
    AsJson,
    Device,
    TrustRemoteCode,
    duration,
    err,
    out,
    print_json,
    size,
)
from calmix.cli.tables import print_rows
from calmix.errors import InputError, nearest
from calmix.files import check_output_file, write_text

if TYPE_CHECKING:
    from calmix.analysis.power import Reach
    from calmix.study.results import Trial
    from calmix.study.running import Execute
    from calmix.study.spec import Study
    from calmix.study.trials import Resolved

StudyPath = Annotated[
    Path, typer.Argument(metavar="STUDY", show_default=False, help="A study's .yaml file.")
]
StorePath = Annotated[
    Path,
    typer.Option("--store", "-o", show_default=False, help="Folder that keeps the results."),
]


NewPath = Annotated[
    Path, typer.Argument(metavar="STUDY", show_default=False, help="The .yaml file to write.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]


def register(study: typer.Typer) -> None:
    """Add the verbs to the sub-command."""
    study.command("init")(init_command)
    study.command("validate")(validate_command)
    study.command("plan")(plan_command)
    study.command("run")(run_command)
    study.command("status")(status_command)
    study.command("export")(export_command)


def init_command(path: NewPath, overwrite: Overwrite = False) -> None:
    """Write a commented study file to start from."""
    _check_new(path, overwrite)
    template = resources.files("calmix.study").joinpath("template.yaml")
    write_text(path, template.read_text(encoding="utf-8"))
    err.print(f"wrote {path}: calmix study validate {path}", soft_wrap=True, highlight=False)


def _check_new(path: Path, overwrite: bool) -> None:
    """Refuse a path at which no study file can be written."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"name a .yaml file for the study, not {path}")
    check_output_file(path, overwrite=overwrite)


def validate_command(path: StudyPath, as_json: AsJson = False) -> None:
    """Check a study file and list every mistake with its line."""
    from calmix.study.spec import check_study
    from calmix.study.trials import plan

    checked = check_study(path)
    trials = plan(checked.study) if checked.study is not None else []
    if as_json:
        print_json({"problems": checked.problems, "trials": [trial.label for trial in trials]})
    for problem in checked.problems:
        if not as_json:
            out.print(problem, soft_wrap=True, highlight=False, markup=False)
    if checked.study is None:
        count = len(checked.problems)
        raise InputError(f"{path} has {count} mistake{'s' if count > 1 else ''}")
    if not as_json:
        sets = len({trial.calibration for trial in trials if trial.draw is not None})
        out.print(
            f"{path}: {len(trials)} trials over {sets} calibration sets",
            soft_wrap=True,
            highlight=False,
        )


def plan_command(
    path: StudyPath,
    device_tflops: Annotated[
        float | None,
        typer.Option(
            show_default=False,
            min=0.001,
            help="Plan on paper for an accelerator of so many half-precision TFLOP/s.",
        ),
    ] = None,
    memory_gb: Annotated[
        float, typer.Option(min=0.001, help="Its memory, with --device-tflops.")
    ] = 80,
    bandwidth_gbs: Annotated[
        float, typer.Option(min=0.001, help="Its memory's bandwidth in GB/s.")
    ] = 3350,
    power: Annotated[
        Path | None,
        typer.Option(
            metavar="STUDY",
            show_default=False,
            help="By the noise of this earlier study's results, what the draws will tell apart.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate trials, time, memory and disk before anything runs."""
    from calmix.study.cost import on_paper
    from calmix.study.planning import estimate, sizes_of_model
    from calmix.study.probe import probe
    from calmix.study.spec import load_study

    study = load_study(path)
    told_apart = [] if power is None else _reach(study, power)
    sizes = {label: sizes_of_model(label, model) for label, model in study.models.items()}
    if device_tflops is not None:
        machine = on_paper(device_tflops, memory_gb, bandwidth_gbs)
    else:
        machine = probe(max(sizes.values(), key=lambda model: model.weights))
    found = estimate(study, sizes, machine)
    told: dict[str, Any] = {
        "study": study.name,
        "machine": asdict(machine),
        "trials": found.trials,
        "calibration_sets": found.sets,
        "seconds": round(found.seconds, 1),
        "seconds_calibration": round(found.sets_seconds, 1),
        "seconds_dense": round(found.dense, 1),
        "disk_bytes": round(found.disk),
        "peak_memory_bytes": round(max(group.cost.memory for group in found.groups)),
        "groups": [asdict(group) for group in found.groups],
        "notes": found.notes,
    }
    if power is not None:
        told["power"] = [asdict(one) for one in told_apart]
    if as_json:
        print_json(told)
        return
    several = len(study.models) > 1
    late = any("recover" in group.cost.seconds for group in found.groups)
    rows = [
        ({"model": group.model} if several else {})
        | {
            "trials": group.trials,
            "method": group.method,
            "pattern": group.pattern,
            "tokens": f"{group.rows}x{group.length}" if group.rows else "-",
            "prune": duration(taken["prune"] + taken.get("allocation", 0)),
        }
        | ({"recover": duration(taken["recover"]) if "recover" in taken else "-"} if late else {})
        | {
            "evaluate": duration(taken["evaluate"]),
            "memory": size(group.cost.memory),
            "disk": size(group.cost.disk),
        }
        for group in found.groups
        for taken in [group.cost.seconds]
    ]
    print_rows(
        rows,
        as_json=False,
        title=f"study {study.name}, each trial on {machine.name}",
        least=["disk", "memory", "tokens", "model"],
    )
    out.print(
        f"{found.trials} trials, {found.sets} calibration sets "
        f"({duration(found.sets_seconds)} to make and measure), dense scores "
        f"({duration(found.dense)}): {duration(found.seconds)} in all, one trial at a time; "
        f"at most {size(told['peak_memory_bytes'])} of memory, {size(found.disk)} on disk",
        soft_wrap=True,
        highlight=False,
    )
    for note in found.notes:
        out.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    if told_apart:
        print_rows(
            [
                {
                    "condition": one.condition,
                    "draws": one.draws,
                    "these items": _points(one.on_these),
                    "other items too": _points(one.with_items),
                }
                for one in told_apart
            ],
            as_json=False,
            title="points of the total told apart, in 80 % of studies (-: not known)",
        )


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


def run_command(
    path: StudyPath,
    store: StorePath,
    only: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            metavar="PATTERN",
            help="Only trials whose calibration, model or label matches, such as 'mix*' (repeat).",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(show_default=False, metavar="PATTERN", help="Not these (repeat)."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run trials that failed once more.")
    ] = False,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(
            show_default=False,
            metavar="STORE",
            help="Of another study: take what both ask for from it (repeat).",
        ),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="local: in this process; ray: on a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            show_default="a Ray of this machine's own",
            help="Of the Ray cluster: auto, HOST:PORT or ray://HOST:PORT.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(show_default="as many as fit", min=1, help="ray: trials at a time."),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(show_default="1", min=0.01, help="ray: CPUs of each trial.")
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(show_default="1 if there are any", min=0, help="ray: GPUs of each trial."),
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(
            show_default="2", min=0, help="ray: how often a trial whose worker died is begun again."
        ),
    ] = None,
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

    execute = _executor(
        executor,
        {"address": address, "workers": workers, "cpus": cpus, "gpus": gpus, "retries": retries},
    )
    study = load_study(path)
    options = Options(device, trust_remote_code, allow_code_execution)
    how: dict[str, Any] = {"options": options, "only": only or (), "skip": skip or ()}
    how |= {"retry_failed": retry_failed, "reuse": reuse or (), "execute": execute}
    with Watch() as watch:
        kept, outcome = run_study(study, store, watch, **how)
    states = [kept.state(entry["id"]) for entry in kept.entries]
    told: dict[str, Any] = {
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


def _executor(name: str, asked: dict[str, Any]) -> Execute | None:
    """Return what runs the trials; None for this process."""
    given = {key: value for key, value in asked.items() if value is not None}
    if name == "ray":
        from calmix.study.cluster import Cluster, on_ray

        return on_ray(Cluster(**given))
    if name != "local":
        raise InputError(f"unknown executor '{name}': {nearest(name, ('local', 'ray'))}")
    if given:
        raise InputError(f"--{next(iter(given))} has no effect without --executor ray")
    return None


def status_command(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", show_default=False, help="A study's results folder.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show how far a study is: finished, running, failed and still to run."""
    from calmix.study.store import open_store

    kept = open_store(store)
    rows = []
    for entry in kept.entries:
        state = kept.state(entry["id"])
        note = ""
        if state == "failed":
            note = kept.read_failure(entry["id"]).error
        elif state == "running":
            note = kept.runner(entry["id"]) or ""
        elif state == "finished":
            found = kept.read_trial(entry["id"])
            note = f"{outcome_line(found)}, {found.seconds.get('total', 0):.0f} s"
        rows.append({"trial": entry["label"], "state": state, "": note})
    states = [row["state"] for row in rows]
    counts = {name: states.count(name) for name in ("finished", "running", "failed", "pending")}
    seconds = [
        kept.read_trial(entry["id"]).seconds.get("total", 0.0)
        for entry, state in zip(kept.entries, states, strict=True)
        if state == "finished"
    ]
    left = counts["running"] + counts["pending"]
    ahead = sum(seconds) / len(seconds) * left if seconds else None
    if as_json:
        trials = [{"trial": r["trial"], "state": r["state"], "note": r[""]} for r in rows]
        print_json({"study": kept.index["name"], **counts, "seconds_left": ahead, "trials": trials})
        return
    title = f"study {kept.index['name']}"
    print_rows(rows, as_json=False, title=title, text=["trial", ""], least=[])
    line = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if left and ahead is not None:
        line += f"; {duration(ahead)} of work left"
    out.print(line, highlight=False)


def export_command(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", show_default=False, help="A study's results folder.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", show_default=False, help="Folder to write to.")
    ],
) -> None:
    """Write the results to a folder that needs no store: study.json and the table."""
    from calmix.study.export import export_results

    for path in export_results(store, output):
        err.print(f"wrote {path}", soft_wrap=True, highlight=False)


def outcome_line(trial: Trial) -> str:
    """Return a trial's total and worst retention in a few words."""
    if trial.total.value is None:
        return "no retention"
    found = f"total {100 * trial.total.value:.1f} %"
    if trial.worst is None:
        return found
    return f"{found}, worst {trial.worst} {100 * (trial.dimensions[trial.worst].value or 0):.1f} %"


class Watch:
    """Shows how a run goes on: a bar on a terminal, and a line for every trial that ends."""

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
        self._total, self._planned, self._ended = todo, planned, 0
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
        found = outcome_line(outcome)
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
