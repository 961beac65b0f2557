"""`evaluate`, `rescore` and `suites`: what a model can do, and what it has kept of another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from calmix.cli.common import (
    LEFT,
    AsJson,
    Device,
    Dtype,
    ModelName,
    TrustRemoteCode,
    err,
    out,
    print_json,
    progress_bar,
)
from calmix.cli.tables import print_rows, show, table_of
from calmix.errors import InputError
from calmix.files import check_output_file, write_text

if TYPE_CHECKING:
    from calmix.capability.distance import Flipped
    from calmix.capability.measures import Measure
    from calmix.capability.retention import Estimate
    from calmix.capability.scores import CapabilityScores
    from calmix.capability.suites import TaskSpec


MeasureName = Annotated[
    str,
    typer.Option(
        "--measure",
        help="primary (each task's own), probability, bits, smoothed, margin, accuracy or ratio.",
    ),
]
SuiteName = Annotated[
    str,
    typer.Option("--suite", help="Suite by name (calmix suites ls), or the path of a YAML file."),
]
Resamples = Annotated[int, typer.Option(help="Bootstrap resamples of the intervals.")]
Seed = Annotated[int, typer.Option(help="Seed of the bootstrap.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("evaluate", rich_help_panel=LEFT)(evaluate_command)
    app.command("rescore", rich_help_panel=LEFT)(rescore)
    suites = typer.Typer(no_args_is_help=True, help="Suites of tasks by capability dimension.")
    suites.command("ls")(suites_ls)
    suites.command("show")(suites_show)
    app.add_typer(suites, name="suites", rich_help_panel=LEFT)


def evaluate_command(
    model: ModelName,
    suite: SuiteName = "offline",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            show_default=False,
            help="Dense model, or a .json file of its scores, to measure retention against.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", show_default=False, help="JSON file to write, with every item."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The suite's quick slice.")] = False,
    limit: Annotated[
        int | None, typer.Option(show_default=False, help="At most so many items a task.")
    ] = None,
    dimension: Annotated[
        list[str] | None, typer.Option(show_default=False, help="Only this dimension (repeat).")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(show_default=False, help="Only this task (repeat).")
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run code the model writes, in a limited subprocess."
        ),
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            show_default="held-out text of each dimension",
            help="Measure the distance to DENSE on this .txt, .jsonl or .parquet file (repeat).",
        ),
    ] = None,
    measure: MeasureName = "primary",
    resamples: Resamples = 2000,
    seed: Seed = 0,
    batch_tokens: Annotated[
        int | None,
        typer.Option(show_default="2048", help="Tokens in one forward pass: speed and memory."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Score the dense model even if its scores are known.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file if it exists.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Score a model on a suite, and with --against say what it has kept, with intervals."""
    from calmix.calibration import open_tokenizer
    from calmix.capability import evaluate as capability
    from calmix.capability.distance import distance, reference
    from calmix.capability.scores import check_same_suite, describe, load_scores
    from calmix.capability.suites import suite_file
    from calmix.capability.texts import builtin_readers, parse_texts, texts
    from calmix.models import OpenModel, check_models, open_model

    chosen = capability.choose(
        suite, dimensions=dimension or (), tasks=task or (), quick=quick, limit=limit
    )
    capability.check_code(chosen, allow_code_execution)
    judged = check_bootstrap(measure, resamples, seed)
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"--batch-tokens must be positive, not {batch_tokens}")
    saved = against is not None and against.lower().endswith(".json")
    own = parse_texts(text or ())
    if own and (against is None or saved):
        raise InputError("--text measures the distance to a dense model: name it with --against")
    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    named = [model] if against is None or saved else [model, against]
    check_models(*named, **how)
    if output is not None:
        inputs = [model, against, suite_file(suite), *own.values()]
        check_output_file(output, inputs=inputs, overwrite=overwrite)

    def opened(name: str) -> OpenModel:
        return open_model(name, **how)

    def run(model: OpenModel, dense: bool) -> CapabilityScores:
        with progress_bar() as bar:
            job = bar.add_task(f"scoring {model.name}", total=None)
            return capability.evaluate(
                model,
                chosen,
                batch_tokens=batch_tokens,
                allow_code_execution=allow_code_execution,
                floors=dense or against is None,
                cache=dense and not no_cache,
                progress=lambda done, total: bar.update(job, completed=done, total=total),
            )

    # All is read, and refused if it does not fit, before anything is scored.
    dense, kept_of = None, None
    held: dict[str, Any] = {}
    if against is not None and saved:
        dense = load_scores(Path(against).expanduser())
        check_same_suite(describe(chosen), dense.suite)
        dense.retention(dense, measure=judged, resamples=1)
    for name in named:
        open_tokenizer(name, trust_remote_code=trust_remote_code)
    if against is not None and not saved:
        whole = opened(against)
        known = [name for name in chosen.dimensions if name in builtin_readers()]
        if known or own:
            held = texts(whole, own, dimensions=known)
            kept_of = reference(whole, held, cache=not no_cache)
        dense = run(whole, True)
        del whole
    pruned = opened(model)
    if kept_of is not None:
        with progress_bar() as bar:
            job = bar.add_task("distance to the dense model", total=None)
            found = distance(
                pruned,
                kept_of,
                held,
                dense=lambda: opened(str(against)),
                resamples=resamples,
                seed=seed,
                progress=lambda done, total: bar.update(job, completed=done, total=total),
            )
    scores = run(pruned, False)
    if kept_of is not None:
        scores = replace(scores, distance=found.to_dict())
    result: dict[str, Any] = {"scores": scores.to_dict()}
    if dense is not None:
        kept = scores.retention(dense, measure=judged, resamples=resamples, seed=seed)
        result |= {"dense": dense.to_dict(), "retention": kept.to_dict()}
    if output is not None:
        write_text(output, json.dumps(result, ensure_ascii=False) + "\n")
    if as_json:
        print_json(result)
        return
    if dense is None:
        _print_scores(scores, judged)
    else:
        _print_retention(scores, dense, judged, resamples, seed)
    for name, count in scores.truncated.items():
        err.print(f"task {name}: {count} requests were cut to fit the model's context")
    if output is not None:
        err.print(f"wrote {output}", soft_wrap=True)


def check_bootstrap(measure: str, resamples: int, seed: int) -> Measure:
    """Return the measure, the options of the intervals checked beside it.

    Raises:
        InputError: an unknown measure, no resample, a negative seed.
    """
    from calmix.capability.measures import check_measure

    if resamples < 1:
        raise InputError(f"the bootstrap needs at least 1 resample, not {resamples}")
    if seed < 0:
        raise InputError(f"the seed must not be negative, but is {seed}")
    return check_measure(measure)


def rescore(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", show_default=False, help="A file of calmix evaluate -o."),
    ],
    measure: MeasureName = "primary",
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DENSE",
            show_default="the one in FILE, if any",
            help="The dense model's file.",
        ),
    ] = None,
    resamples: Resamples = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compute scores and retention anew from a file, by another measure, without the model."""
    from calmix.capability.scores import load_dense, load_scores

    judged = check_bootstrap(measure, resamples, seed)
    scores = load_scores(file)
    dense = load_dense(file) if against is None else load_scores(against)
    if dense is None:
        if as_json:
            print_json(score_rows(scores, judged))
        else:
            _print_scores(scores, judged)
        return
    if as_json:
        print_json(
            scores.retention(dense, measure=judged, resamples=resamples, seed=seed).to_dict()
        )
    else:
        _print_retention(scores, dense, judged, resamples, seed)


def _head(table: Table, dimension: str, seen: set[str]) -> None:
    """Begin a dimension's part of a table with its name."""
    if dimension not in seen:
        seen.add(dimension)
        table.add_row(Text(dimension, style="bold"))


def _suite_title(scores: CapabilityScores) -> str:
    suite = scores.suite
    return f"suite {suite['name']} version {suite['version']}, {scores.dtype}"


def score_rows(scores: CapabilityScores, measure: Measure) -> list[dict[str, Any]]:
    """Return a record a task: its score, what knowing nothing scores, noise, signal, accuracy."""
    kept = scores.retention(scores, measure=measure, resamples=1)
    return [
        {
            "dimension": task.dimension, "task": task.name, "n": task.items,
            "score": task.score, "floor": task.floor, "value": task.dense,
            "noise": task.noise, "signal": task.signal, "accuracy": task.dense_accuracy,
        }
        for task in kept.tasks
    ]  # fmt: skip


def _print_scores(scores: CapabilityScores, measure: Measure) -> None:
    table = table_of(
        f"{scores.model}: {_suite_title(scores)}, {scores.seconds:.0f} s",
        ["task", "scored by", "n", "floor", "score", "signal", "accuracy"],
        left=2,
    )
    seen: set[str] = set()
    for row in score_rows(scores, measure):
        _head(table, row["dimension"], seen)
        table.add_row(
            f"  {row['task']}",
            row["score"],
            str(row["n"]),
            _number(row["floor"]),
            _number(row["value"]),
            "yes" if row["signal"] else "no",
            _number(row["accuracy"]),
        )
    show(table, least=["scored by", "floor", "accuracy", "n"])


def _print_retention(
    scores: CapabilityScores,
    dense: CapabilityScores,
    measure: Measure,
    resamples: int,
    seed: int,
) -> None:
    kept = scores.retention(dense, measure=measure, resamples=resamples, seed=seed)
    title = f"{scores.model} against {dense.model}: {_suite_title(scores)}"
    columns = ["task", "n", "scored by", "dense", "pruned", "accuracy", "retention %"]
    table = table_of(title, columns)
    seen: set[str] = set()
    for task in kept.tasks:
        _head(table, task.dimension, seen)
        pair = f"{_number(task.dense_accuracy)} {_number(task.pruned_accuracy)}"
        table.add_row(
            f"  {task.name}",
            str(task.items),
            task.score,
            _number(task.dense),
            _number(task.pruned),
            pair if task.dense_accuracy is not None else "-",
            interval(task.kept) if task.signal else "no signal",
        )
    show(table, least=["scored by", "n", "accuracy", "dense", "pruned"])
    other = scores.retention(dense, measure="accuracy", resamples=resamples, seed=seed)
    summary = table_of(
        "retention %, mean over tasks with signal",
        ["dimension", "tasks", f"by {measure}", "by accuracy"],
    )
    for dimension in kept.dimensions:
        counted = dimension.tasks - len(dimension.without_signal)
        summary.add_row(
            dimension.name,
            f"{counted} of {dimension.tasks}",
            interval(dimension.kept),
            interval(other.of(dimension.name)),
        )
    summary.add_section()
    summary.add_row("total", "", interval(kept.total), interval(other.total))
    if kept.worst is not None:
        summary.add_row(
            f"worst: {kept.worst}", "", interval(kept.of(kept.worst)),
            interval(other.of(kept.worst)),
        )  # fmt: skip
    show(summary)
    silent = [task.name for task in kept.tasks if not task.signal]
    if silent:
        out.print(
            "no signal (dense score within its noise of knowing nothing, left out): "
            + ", ".join(silent)
        )
    out.print(legend(resamples, seed), highlight=False)
    _print_distance(scores, dense, resamples, seed)


def _print_distance(
    scores: CapabilityScores, dense: CapabilityScores, resamples: int, seed: int
) -> None:
    """Print how far a model is from the dense one: KL on texts if measured, flips on items."""
    from calmix.capability.distance import flips

    changed = flips(dense.tasks, scores.tasks, resamples=resamples, seed=seed)
    measured = scores.distance
    columns = ["text", "KL", "median", "99 %", "top-1 %"] if measured else ["items"]
    table = table_of("distance to the dense model", [*columns, "flips %"])
    parts = dict(measured["dimensions"]) if measured else {}
    for name in dict.fromkeys([*parts, *changed.dimensions]):
        share = changed.dimensions.get(name)
        table.add_row(name, *kl_cells(parts.get(name), measured), _share(share))
    table.add_section()
    total = measured["total"] if measured else None
    table.add_row("total", *kl_cells(total, measured), _share(changed.total))
    show(table, least=["median", "99 %", "top-1 %"])
    if measured is None:
        out.print("KL to the dense model needs the model itself: --against MODEL, not its scores")
    else:
        out.print("KL(dense || pruned) in nats a token; flips: items right under one alone")


def kl_cells(found: dict[str, Any] | None, measured: Any) -> list[str]:
    """Return a distance's cells; none where no distance was measured at all."""
    if not measured:
        return []
    if found is None:
        return ["-"] * 4
    mean = f"{found['kl_mean']:.3f}"
    if found["kl_low"] is not None:
        mean += f" [{found['kl_low']:.3f}, {found['kl_high']:.3f}]"
    rest = f"{found['kl_median']:.3f}", f"{found['kl_p99']:.2f}", _percent(found["top1"])
    return [mean, *rest]


def _share(found: Flipped | None) -> str:
    return "-" if found is None else interval(found.share)


def legend(resamples: int, seed: int) -> str:
    """Return what the figures of a table of retention mean."""
    return (
        "100 is the dense model, 0 one without the knowledge; by accuracy: corrected for\n"
        f"chance. Brackets: 95 %, over items, {resamples} resamples, seed {seed}."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def interval(value: Estimate) -> str:
    """Return an estimate in per cent with its interval."""
    if value.value is None:
        return "-"
    return f"{_percent(value.value)} [{_percent(value.low)}, {_percent(value.high)}]"


def suites_ls(as_json: AsJson = False) -> None:
    """List the builtin suites. The path of a YAML file is a suite too."""
    from calmix.capability.suites import builtin_suites, provenance
    from calmix.sources.licences import use_of

    rows = [
        {
            "name": suite.name,
            "version": suite.version,
            "dimensions": ", ".join(suite.dimensions),
            "tasks": len(suite.tasks),
            "not for commercial use": ", ".join(
                name
                for name, spec in suite.tasks.items()
                if use_of(provenance(spec)["licence"]) == "non-commercial"
            ),
            "description": suite.description,
        }
        | ({"task": {n: _whose(spec) for n, spec in suite.tasks.items()}} if as_json else {})
        for suite in builtin_suites().values()
    ]
    print_rows(
        rows,
        as_json=as_json,
        text=["dimensions", "not for commercial use", "description"],
        least=["not for commercial use", "tasks"],
    )


def _whose(spec: TaskSpec) -> dict[str, str]:
    """Return licence, what it lets one do, and origin of a task's items."""
    from calmix.capability.suites import provenance
    from calmix.sources.licences import use_of

    found = provenance(spec)
    return {**found, "use": use_of(found["licence"])}


def suites_show(
    name: Annotated[str, typer.Argument(help="Suite by name, or the path of a YAML file.")],
    as_json: AsJson = False,
) -> None:
    """Show a suite's tasks; a user's own file is checked by that."""
    from calmix.capability.suites import load_suite

    suite = load_suite(name)
    if as_json:
        whose = {name: _whose(spec) for name, spec in suite.tasks.items()}
        told = suite.model_dump(mode="json", exclude_none=True)
        print_json({**told, "hash": suite.hash, "provenance": whose})
        return
    table = table_of(
        f"{suite.name} version {suite.version}: {suite.description}",
        ["task", "metric", "shots", "items", "quick", "chance", "data"],
        left=2,
    )
    table.columns[-1].justify = "left"
    seen: set[str] = set()
    for task, spec in suite.tasks.items():
        _head(table, suite.dimension_of(task), seen)
        which = "even" if spec.items == "even" else "all"
        table.add_row(
            f"  {task}",
            spec.metric,
            "own" if spec.shots is None else str(spec.shots),
            which if spec.limit is None else f"{which}, {spec.limit}",
            str(spec.quick or spec.limit or "all"),
            "-" if spec.chance is None else str(spec.chance),
            " ".join(part for part in (spec.harness, spec.archive) if part),
        )
    show(table, text=["data"], least=["chance", "shots", "metric", "data"])
    rows = [{"task": name, **_whose(spec)} for name, spec in suite.tasks.items()]
    print_rows(rows, as_json=False, text=["licence"], least=["origin", "licence"])
