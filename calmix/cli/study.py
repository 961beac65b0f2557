"""`study`: write, check, plan and run many trials from one file, and report the results."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

from calmix.cli.common import line, note, print_json, print_table
from calmix.cli.verbs import group, verb
from calmix.errors import InputError
from calmix.files import (
    check_output_file,
    check_output_folder,
    real_place,
    size_text,
    write_text,
)
from calmix.options import (
    TRUST,
    Settings,
    TrialOptions,
    advanced,
    option,
    path_option,
)
from calmix.progress import Progress

STUDY_FILE = option(..., "A study's .yaml file.", argument=True, metavar="STUDY", names="path")
studies = group("study")


class ReportOptions(Settings):
    """What is analysed, and where the report goes."""

    study: Path = option(..., "A study's results folder.", argument=True, names="path")
    output: Path | None = path_option(None, "Folder to write.", shown="in STUDY")
    overwrite: bool = option(False, "Replace what calmix wrote there.")


@verb("init", of=studies, json=False)
def init(
    study: Path = option(..., "The .yaml file to write.", argument=True, metavar="STUDY"),
    overwrite: bool = option(False, "Replace the file if it exists."),
) -> None:
    """Write a commented study file to start from."""
    check_output_file(study, overwrite=overwrite)
    template = resources.files("calmix.study").joinpath("template.yaml")
    write_text(study, template.read_text(encoding="utf-8"))
    note(f"wrote {study}: calmix study plan {study}")


@verb("plan", of=studies)
def plan(
    study: Path = STUDY_FILE,
    device: str = option("auto", "Torch device to plan for, e.g. cuda:1."),
    trust_remote_code: bool = TRUST,
) -> None:
    """Print what a study declares, its trials, memory and disk, or every mistake with its line."""
    from calmix.study import trials
    from calmix.study.declaration import declaration
    from calmix.study.estimate import study_cost
    from calmix.study.spec import check_study

    file, problems = check_study(study)
    if file is None:
        print_json({"problems": problems})
        for problem in problems:
            line(problem)
        raise InputError(f"{study} has {len(problems)} mistake{'s' * (len(problems) > 1)}")
    declared = declaration(file, trials.planned_trials(file))
    costs = study_cost(file, device, trust_remote_code=trust_remote_code)
    print_json({"study": file.file.name, "declaration": declared.hash, **costs})
    rows = [
        {
            "model": each["model"] if len(file.file.models) > 1 else None,
            **{name: each[name] for name in ("trials", "method", "pattern")},
            "tokens": f"{each['rows']}x{each['length']}" if each["rows"] else None,
            "memory": size_text(each["memory"]),
            "disk": size_text(each["disk"]),
        }
        for each in costs["groups"]
    ]
    print_table(
        rows,
        title=f"study {file.file.name}, each trial",
        least=["disk", "memory", "tokens", "model"],
    )
    line(
        f"{costs['trials']} trials of {costs['items']} items, {costs['prunes']} pruned models, "
        f"{costs['sets']} calibration sets; at most {size_text(costs['memory'])} of memory, one "
        f"trial at a time, and {size_text(costs['disk'])} on disk"
    )
    line(f"{study} {declared}")
    for text in costs["notes"]:
        line(f"note: {text}")


@verb("run", of=studies)
def run(
    trials: TrialOptions,
    study: Path = STUDY_FILE,
    store: Path = option(..., "Folder for the results.", flag="--store -o", metavar="STORE"),
    only: list[str] = option(
        [], "Only trials whose set, model or label matches, e.g. 'mix*'.", metavar="PATTERN"
    ),
    skip: list[str] = option([], "Skip these trials (repeat).", metavar="PATTERN"),
    retry_failed: bool = option(False, "Run failed trials again."),
    executor: Literal["local", "ray"] = option("local", "In this process, or on a Ray cluster."),
    address: str | None = advanced(
        None, "Ray cluster: auto, HOST:PORT or ray://HOST:PORT.", shown="one on this machine"
    ),
    workers: int | None = advanced(None, "Ray: trials at a time.", shown="as many as fit", ge=1),
    cpus: float | None = advanced(None, "Ray: CPUs per trial.", shown="1", gt=0),
    gpus: float | None = advanced(None, "Ray: GPUs per trial.", shown="1 if there are any", ge=0),
    retries: int | None = advanced(
        None, "Ray: restarts of a trial whose worker died.", shown="2", ge=0
    ),
) -> None:
    """Run the remaining trials of a study; if interrupted, run the same command again to resume."""
    from calmix.study.running import on_ray, run_study
    from calmix.study.spec import load_study

    on = {"address": address, "workers": workers, "cpus": cpus, "gpus": gpus, "retries": retries}
    settings: dict[str, Any] = {key: value for key, value in on.items() if value is not None}
    if settings and executor == "local":
        raise InputError(f"--{next(iter(settings))} has no effect without --executor ray")
    execute = on_ray(**settings) if executor == "ray" else None
    with Progress() as bar:
        opened_store, left = run_study(
            load_study(study),
            store,
            note=note,
            show=bar.show,
            options=trials,
            only=only,
            skip=skip,
            retry_failed=retry_failed,
            execute=execute,
        )
    states = [opened_store.state(entry.id) for entry in opened_store.index.trials]
    done = states.count("finished")
    failed, elsewhere = (
        {label: what for label, (how, what) in left.items() if how == ended}
        for ended in ("failed", "elsewhere")
    )
    print_json(
        {
            "store": str(store),
            "planned": len(states),
            "finished": done,
            "failed": failed,
            "elsewhere": elsewhere,
        }
    )
    line(f"{done} of {len(states)} trials finished: {store}")
    for label, who in elsewhere.items():
        note(f"left to {who}: {label}")
    if failed:
        label, error = next(iter(failed.items()))
        raise InputError(
            f"{len(failed)} trials failed, first '{label}' ({error}): fix the cause and run again "
            "with --retry-failed"
        )


@verb("status", of=studies)
def status(
    store: Path = option(
        ..., "A study's results folder.", argument=True, metavar="STORE", names="path"
    ),
) -> None:
    """Show which trials are finished, running, failed or pending."""
    from calmix.study.store import open_store

    opened_store, rows = open_store(store), []
    for entry in opened_store.index.trials:
        state, text = opened_store.state(entry.id), ""
        if state == "failed":
            text = opened_store.error(entry)
        elif state == "running":
            text = opened_store.runner(entry.id) or ""
        elif state == "finished":
            text = opened_store.result(entry).trial.summary
        rows.append({"trial": entry.label, "state": state, "note": text})
    states = [row["state"] for row in rows]
    counts = {name: states.count(name) for name in ("finished", "running", "failed", "pending")}
    name = opened_store.index.name
    print_json({"study": name, **counts, "trials": rows})
    print_table(rows, title=f"study {name}", text=["trial", "note"], least=[])
    line(", ".join(f"{count} {name}" for name, count in counts.items() if count))


@verb("report", of=studies)
def report(options: ReportOptions) -> None:
    """Judge the declared comparisons, explore all else; write a page, JSON and CSV.

    An earlier report is replaced.
    """
    from calmix.study.analyse import analyse
    from calmix.study.page import summary_text, write_report
    from calmix.study.store import read_results

    study, folder = options.study, options.output or options.study / "report"
    if options.output is None and not study.is_dir():
        raise InputError(f"there is no folder {study}")
    page = folder / "report.html"
    inputs = [] if real_place(folder) == real_place(study / "report") else [study]
    check_output_folder(folder, inputs=inputs, overwrite=options.overwrite or page.is_file())
    results = read_results(study)
    analysis = analyse(results, options)
    write_report(results, analysis, folder)
    print_json(analysis.to_dict())
    line(summary_text(analysis))
    line(f"\nwritten to {page}")
