"""`evaluate` and `compare`: what a model can do, and what it has kept of another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from calmix.cli.common import err, line, print_json, progress_bar
from calmix.cli.tables import print_rows, show, table_of
from calmix.cli.verbs import group, verb
from calmix.errors import InputError
from calmix.evaluation.suites import Measure
from calmix.files import check_output_file, user_path, write_text
from calmix.options import MODEL, Json, ModelOptions, Options, option, path_option

if TYPE_CHECKING:
    from calmix.evaluation.distance import Flipped
    from calmix.evaluation.retention import Estimate, Retention
    from calmix.evaluation.scores import CapabilityScores
    from calmix.evaluation.suites import Suite, TaskSpec

BESIDE = 3  # models whose intervals fit next to each other into 80 columns
DENSE = "Dense model, or a .json file of its scores."


class RetentionOptions(Options):
    """How retention is computed from scores."""

    measure: Measure = option("primary", "What retention is of, e.g. accuracy.", metavar="NAME")
    resamples: int = option(2000, "Bootstrap resamples of the intervals.", ge=1, advanced=True)
    seed: int = option(0, "Seed of the bootstrap.", ge=0, advanced=True)

    def judged(self) -> dict[str, Any]:
        """Return measure, resamples and seed by name."""
        return {"measure": self.measure, "resamples": self.resamples, "seed": self.seed}


class EvaluateOptions(RetentionOptions, ModelOptions, Json):
    """What `evaluate` can be asked for."""

    model: str = option(..., MODEL, argument=True)
    suite: str = option("offline", "Suite by name, or a YAML file.")
    against: str | None = option(None, DENSE, metavar="DENSE")
    output: Path | None = path_option("JSON file to write, with every item.", default=None)
    quick: bool = option(False, "The suite's quick slice.")
    limit: int | None = option(None, "Items per task at most, e.g. 50.", ge=1)
    dimension: tuple[str, ...] = option((), "Only this dimension (repeat).")
    task: tuple[str, ...] = option((), "Only this task (repeat).")
    allow_code_execution: bool = option(
        False, "Run code the model writes, in a limited subprocess."
    )
    text: tuple[str, ...] = option(
        (), "Text to measure distance on, e.g. code=mine.jsonl (repeat).", metavar="NAME=PATH",
        advanced=True,
    )  # fmt: skip
    batch_tokens: int | None = option(
        None, "Tokens per forward pass.", shown="2048", ge=1, advanced=True
    )
    no_cache: bool = option(False, "Score the dense model again.", advanced=True)
    overwrite: bool = option(False, "Replace the output file.")


class RescoreOptions(RetentionOptions, Json):
    """What `evaluate rescore` can be asked for."""

    file: Path = option(..., "A file of calmix evaluate -o.", argument=True)
    against: Path | None = option(None, "The dense model's file.", shown="the one in FILE")


class CompareOptions(RetentionOptions, Json):
    """What `compare` can be asked for."""

    scores: tuple[Path, ...] = option(..., "Files of calmix evaluate -o.", argument=True)
    against: Path | None = option(None, "The dense model's file.", shown="the one in SCORES")


class AnswerOptions(ModelOptions):
    """What `evaluate answers` can be asked for."""

    models: tuple[str, ...] = option(..., "Models, the dense one first.", argument=True)
    output: Path = path_option("JSON file to write.")
    suite: str = option("offline", "Suite whose items are asked.")
    prompts: Path | None = option(None, "Prompts of your own: .txt, .jsonl or .parquet.")
    overwrite: bool = option(False, "Replace the output file.")


class PerplexityOptions(ModelOptions, Json):
    """What `evaluate perplexity` can be asked for."""

    model: str = option(..., MODEL, argument=True)
    text: Path = option(..., "A .txt, .jsonl or .parquet file.")
    length: int = option(2048, "Tokens per window.", ge=2)
    separator: str = option("", "Text between the documents of the file.", advanced=True)


class SuiteOptions(Json):
    """What `evaluate suite` can be asked for."""

    name: str = option(..., "Suite by name, or a YAML file.", argument=True)


def register(app: typer.Typer, panel: str) -> None:
    """Add the verbs to the command line."""
    evaluate = group(app, "evaluate", "Score a model, and what it kept of a dense one.", "run",
                     panel)  # fmt: skip
    verb(evaluate, "run")(run)
    verb(evaluate, "rescore")(rescore)
    verb(evaluate, "answers")(answers)
    verb(evaluate, "perplexity")(perplexity)
    verb(evaluate, "suites")(suites)
    verb(evaluate, "suite")(suite)
    verb(app, "compare", panel)(compare)


def run(options: EvaluateOptions) -> None:
    """Score a model on a suite; with --against, report what it kept, with intervals."""
    from calmix.calibration import open_tokenizer
    from calmix.calibration.texts import builtin_readers, parse_texts, texts
    from calmix.evaluation import evaluate as capability
    from calmix.evaluation.distance import distance, reference
    from calmix.evaluation.scores import check_same_suite, describe, load_scores
    from calmix.evaluation.suites import suite_file
    from calmix.models import OpenModel, check_models, open_model

    model, against, output = options.model, options.against, options.output
    chosen = capability.choose(
        options.suite, dimensions=options.dimension, tasks=options.task, quick=options.quick,
        limit=options.limit,
    )  # fmt: skip
    capability.check_code(chosen, options.allow_code_execution)
    saved = against is not None and against.lower().endswith(".json")
    own = parse_texts(options.text)
    if own and (against is None or saved):
        raise InputError("--text measures the distance to a dense model: name it with --against")
    how = options.opening()
    named = [model] if against is None or saved else [model, against]
    if output is not None:
        inputs = [model, against, suite_file(options.suite), *own.values()]
        check_output_file(output, inputs=inputs, overwrite=options.overwrite)
    check_models(*named, **how)

    def score(opened: OpenModel, dense: bool) -> CapabilityScores:
        with progress_bar() as bar:
            return capability.evaluate(
                opened, chosen, batch_tokens=options.batch_tokens,
                allow_code_execution=options.allow_code_execution,
                floors=dense or against is None, cache=dense and not options.no_cache,
                progress=_shown(bar, f"scoring {opened.name}"),
            )  # fmt: skip

    # All is read, and refused if it does not fit, before anything is scored.
    dense, kept_of, held = None, None, {}
    if against is not None and saved:
        dense = load_scores(user_path(against))
        check_same_suite(describe(chosen), dense.suite)
        dense.retention(dense, measure=options.measure, resamples=1)
    for name in named:
        open_tokenizer(name, trust_remote_code=options.trust_remote_code)
    if against is not None and not saved:
        whole = open_model(against, **how)
        known = [name for name in chosen.dimensions if name in builtin_readers()]
        if known or own:
            held = texts(whole, own, dimensions=known)
            kept_of = reference(whole, held, cache=not options.no_cache)
        dense = score(whole, True)
        del whole
    pruned = open_model(model, **how)
    found = None
    if kept_of is not None:
        with progress_bar() as bar:
            found = distance(
                pruned, kept_of, held, dense=lambda: open_model(str(against), **how),
                resamples=options.resamples, seed=options.seed,
                progress=_shown(bar, "distance to the dense model"),
            ).to_dict()  # fmt: skip
    scores = replace(score(pruned, False), distance=found)
    result: dict[str, Any] = {"scores": scores.to_dict()}
    if dense is not None:
        kept = scores.retention(dense, **options.judged())
        result |= {"dense": dense.to_dict(), "retention": kept.to_dict()}
    if output is not None:
        write_text(output, json.dumps(result, ensure_ascii=False) + "\n")
    if options.as_json:
        print_json(result)
        return
    _print(scores, dense, options)
    for name, count in scores.truncated.items():
        err.print(f"task {name}: {count} requests were cut to fit the model's context")
    if output is not None:
        err.print(f"wrote {output}", soft_wrap=True)


def _shown(bar: Any, what: str) -> Callable[[int, int], None]:
    task = bar.add_task(what, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def rescore(options: RescoreOptions) -> None:
    """Compute scores and retention again from a file, by another measure, without the model."""
    from calmix.evaluation.scores import load_dense, load_scores

    scores, against = load_scores(options.file), options.against
    dense = load_dense(options.file) if against is None else load_scores(against)
    if not options.as_json:
        _print(scores, dense, options)
    elif dense is None:
        print_json(score_rows(scores, options.measure))
    else:
        print_json(scores.retention(dense, **options.judged()).to_dict())


def compare(options: CompareOptions) -> None:
    """Put the retention of several models next to each other, dimension by dimension."""
    from calmix.evaluation.distance import flips
    from calmix.evaluation.scores import load_dense, load_scores

    scores, how = options.scores, options.judged()
    # A folder of calmix compress is known by its own name.
    names = [path.resolve().parent.name if path.stem == "scores" else path.stem for path in scores]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two files are called {doubles[0]}: rename one, to tell them apart")
    dense = load_dense(scores[0]) if options.against is None else load_scores(options.against)
    if dense is None:
        raise InputError(
            f"{scores[0]} was scored without a dense model: name its file with --against"
        )
    models = {name: load_scores(path) for name, path in zip(names, scores, strict=True)}
    kept = {name: one.retention(dense, **how) for name, one in models.items()}
    if options.as_json:
        print_json({name: retention.to_dict() for name, retention in kept.items()})
        return
    how_flips = {"resamples": options.resamples, "seed": options.seed}
    changed = [flips(dense.tasks, one.tasks, **how_flips).total for one in models.values()]
    far = [(model.distance or {}).get("total") for model in models.values()]
    whole: list[Retention] = list(kept.values())
    rows: dict[str, list[str]] = {
        one.name: [interval(each.of(one.name)) for each in whole] for one in whole[0].dimensions
    }
    rows["total"] = [interval(each.total) for each in whole]
    rows["worst"] = [each.worst or "-" for each in whole]
    if options.measure != "accuracy":
        by = how | {"measure": "accuracy"}
        rows["by accuracy"] = [interval(m.retention(dense, **by).total) for m in models.values()]
    if any(far):
        rows["KL to dense"] = [_kl_cells(one, far)[0] for one in far]
        rows["top-1 %"] = [_kl_cells(one, far)[-1] for one in far]
    rows["flips %"] = ["-" if one is None else interval(one.share) for one in changed]
    suite = dense.suite
    title = f"retention %, suite {suite['name']} version {suite['version']}, by {options.measure}"
    least = ["by accuracy", "top-1 %", "flips %", "worst", "KL to dense"]
    if len(models) <= BESIDE:
        least = []
        table = table_of(title, ["", *names])
        for label, cells in rows.items():
            if label in ("total", "by accuracy", "KL to dense"):
                table.add_section()
            table.add_row(label, *cells)
    else:  # a row a model, the intervals but the total's left out
        table = table_of(title, ["", *rows])
        for number, name in enumerate(names):
            cells = [
                row[number] if label == "total" else row[number].split(" ")[0]
                for label, row in rows.items()
            ]
            table.add_row(name, *cells)
    show(table, least=least)
    _legend(options)


def score_rows(scores: CapabilityScores, measure: Measure) -> list[dict[str, Any]]:
    """Return a record a task: its score, its baseline, noise, signal, accuracy."""
    kept = scores.retention(scores, measure=measure, resamples=1)
    return [
        {
            "dimension": task.dimension, "task": task.name, "n": task.items,
            "score": task.score, "floor": task.floor, "value": task.dense,
            "noise": task.noise, "signal": task.signal, "accuracy": task.dense_accuracy,
        }
        for task in kept.tasks
    ]  # fmt: skip


def _print(
    scores: CapabilityScores, dense: CapabilityScores | None, options: RetentionOptions
) -> None:
    """Print scores, or what they are of a dense model's."""
    suite = scores.suite
    title = f"suite {suite['name']} version {suite['version']}, {scores.dtype}"
    if dense is not None:
        _print_retention(scores, dense, options, title)
        return
    table = table_of(
        f"{scores.model}: {title}, {scores.seconds:.0f} s",
        ["task", "scored by", "n", "baseline", "score", "signal", "accuracy"], left=2,
    )  # fmt: skip
    seen: set[str] = set()
    for row in score_rows(scores, options.measure):
        _head(table, row["dimension"], seen)
        table.add_row(
            f"  {row['task']}", row["score"], str(row["n"]), _number(row["floor"]),
            _number(row["value"]), "yes" if row["signal"] else "no", _number(row["accuracy"]),
        )  # fmt: skip
    show(table, least=["scored by", "baseline", "accuracy", "n"])


def _head(table: Table, dimension: str, seen: set[str]) -> None:
    """Begin a dimension's part of a table with its name."""
    if dimension not in seen:
        seen.add(dimension)
        table.add_row(Text(dimension, style="bold"))


def _print_retention(
    scores: CapabilityScores, dense: CapabilityScores, options: RetentionOptions, title: str
) -> None:
    kept = scores.retention(dense, **options.judged())
    columns = ["task", "n", "scored by", "dense", "pruned", "accuracy", "retention %"]
    table = table_of(f"{scores.model} against {dense.model}: {title}", columns)
    seen: set[str] = set()
    for task in kept.tasks:
        _head(table, task.dimension, seen)
        pair = f"{_number(task.dense_accuracy)} {_number(task.pruned_accuracy)}"
        table.add_row(
            f"  {task.name}", str(task.items), task.score, _number(task.dense),
            _number(task.pruned), pair if task.dense_accuracy is not None else "-",
            interval(task.kept) if task.signal else "no signal",
        )  # fmt: skip
    show(table, least=["scored by", "n", "accuracy", "dense", "pruned"])
    other = scores.retention(dense, **options.judged() | {"measure": "accuracy"})
    summary = table_of(
        "retention %, mean over tasks with signal",
        ["dimension", "tasks", f"by {options.measure}", "by accuracy"],
    )
    for dimension in kept.dimensions:
        counted = dimension.tasks - len(dimension.without_signal)
        summary.add_row(
            dimension.name, f"{counted} of {dimension.tasks}", interval(dimension.kept),
            interval(other.of(dimension.name)),
        )  # fmt: skip
    summary.add_section()
    summary.add_row("total", "", interval(kept.total), interval(other.total))
    if (worst := kept.worst) is not None:
        both = interval(kept.of(worst)), interval(other.of(worst))
        summary.add_row(f"worst: {worst}", "", *both)
    show(summary)
    if silent := [task.name for task in kept.tasks if not task.signal]:
        line(
            "no signal (dense score within its noise of the baseline, left out): "
            + ", ".join(silent)
        )
    _legend(options)
    _print_distance(scores, dense, options)


def _print_distance(
    scores: CapabilityScores, dense: CapabilityScores, options: RetentionOptions
) -> None:
    """Print KL to the dense model on texts, if measured, and flips on items."""
    from calmix.evaluation.distance import flips

    changed = flips(dense.tasks, scores.tasks, resamples=options.resamples, seed=options.seed)
    measured = scores.distance
    columns = ["text", "KL", "median", "99 %", "top-1 %"] if measured else ["items"]
    table = table_of("distance to the dense model", [*columns, "flips %"])
    parts = dict(measured["dimensions"]) if measured else {}
    for name in dict.fromkeys([*parts, *changed.dimensions]):
        share = changed.dimensions.get(name)
        table.add_row(name, *_kl_cells(parts.get(name), measured), _share(share))
    table.add_section()
    total = measured["total"] if measured else None
    table.add_row("total", *_kl_cells(total, measured), _share(changed.total))
    show(table, least=["median", "99 %", "top-1 %"])
    if measured is None:
        line("KL to the dense model needs the model itself: --against MODEL, not its scores")
    else:
        line("KL(dense || pruned) in nats a token; flips: items right under one alone")


def _kl_cells(found: dict[str, Any] | None, measured: Any) -> list[str]:
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


def _legend(options: RetentionOptions) -> None:
    line(
        "100 = dense model, 0 = baseline without task knowledge (by accuracy: chance).\n"
        f"Brackets: 95 %, over items, {options.resamples} resamples, seed {options.seed}."
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


def answers(options: AnswerOptions) -> None:
    """Write what several models answer to the same prompts, greedily."""
    from calmix.evaluation.generations import Answered, answer, read_prompts, suite_prompts
    from calmix.evaluation.suites import load_suite, suite_file
    from calmix.models import check_models, open_model

    models, prompts, output = options.models, options.prompts, options.output
    chosen, how = load_suite(options.suite), options.opening()
    inputs = [*models, prompts, suite_file(options.suite)]
    check_output_file(output, inputs=inputs, overwrite=options.overwrite)
    check_models(*models, **how)
    asked = read_prompts(prompts) if prompts is not None else suite_prompts(chosen)
    if not asked:
        raise InputError(
            f"suite {options.suite} has no items in the archive to ask: give --prompts FILE"
        )
    named, written = [], []
    for name in models:
        opened = open_model(name, **how)
        with progress_bar() as bar:
            written.append(answer(opened, asked, progress=_shown(bar, f"{name} answers")))
        named.append((name, opened.fingerprint))
    Answered(tuple(asked), tuple(named), tuple(written)).save(output)
    same = sum(len(set(texts)) == 1 for texts in zip(*written, strict=True))
    line(f"{output}: {len(asked)} prompts, {same} with the same answer of all models")


def perplexity(options: PerplexityOptions) -> None:
    """Perplexity and bits per byte of a text, in non-overlapping windows of one length."""
    from calmix.evaluation.perplexity import perplexity as measure
    from calmix.models import check_models, open_model
    from calmix.sources.readers import LocalFile

    documents = LocalFile(type="file", path=options.text).read()
    whole = options.separator.join(document.text for document in documents)
    check_models(options.model, **options.opening())
    opened = open_model(options.model, **options.opening())
    with progress_bar() as bar:
        tick = _shown(bar, "scoring windows")
        result = measure(opened, whole, length=options.length, tick=tick)
    if options.as_json:
        print_json({"model": options.model, "text": str(options.text)} | asdict(result))
    else:
        line(f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte "
             f"(context {result.length}, {result.windows} windows)")  # fmt: skip


def suites(options: Json) -> None:
    """List the builtin suites; the path of a YAML file is a suite too."""
    from calmix.evaluation.suites import builtin_suites

    rows = []
    for each in builtin_suites().values():
        whose = {name: _whose(spec) for name, spec in each.tasks.items()}
        row: dict[str, Any] = {
            "name": each.name,
            "version": each.version,
            "dimensions": ", ".join(each.dimensions),
            "tasks": len(each.tasks),
            "not for commercial use": ", ".join(
                name for name, told in whose.items() if told["use"] == "non-commercial"
            ),
            "description": each.description,
        }
        rows.append(row | ({"task": whose} if options.as_json else {}))
    print_rows(
        rows, as_json=options.as_json, text=["dimensions", "not for commercial use", "description"],
        least=["not for commercial use", "tasks"],
    )  # fmt: skip


def _whose(spec: TaskSpec) -> dict[str, str]:
    """Return licence, permitted use and origin of a task's items."""
    from calmix.evaluation.suites import provenance
    from calmix.sources.licences import use_of

    found = provenance(spec)
    return {**found, "use": use_of(found["licence"])}


def suite(options: SuiteOptions) -> None:
    """Show a suite's tasks, which also checks a file of your own."""
    from calmix.evaluation.suites import load_suite

    shown: Suite = load_suite(options.name)
    if options.as_json:
        whose = {name: _whose(spec) for name, spec in shown.tasks.items()}
        told = shown.model_dump(mode="json", exclude_none=True)
        print_json({**told, "hash": shown.hash, "provenance": whose})
        return
    table = table_of(
        f"{shown.name} version {shown.version}: {shown.description}",
        ["task", "metric", "shots", "items", "quick", "chance", "data"], left=2,
    )  # fmt: skip
    table.columns[-1].justify = "left"
    seen: set[str] = set()
    for task, spec in shown.tasks.items():
        _head(table, shown.dimension_of(task), seen)
        which = "even" if spec.items == "even" else "all"
        table.add_row(
            f"  {task}", spec.metric, "own" if spec.shots is None else str(spec.shots),
            which if spec.limit is None else f"{which}, {spec.limit}",
            str(spec.quick or spec.limit or "all"),
            "-" if spec.chance is None else str(spec.chance),
            " ".join(part for part in (spec.harness, spec.archive) if part),
        )  # fmt: skip
    show(table, text=["data"], least=["chance", "shots", "metric", "data"])
    rows = [{"task": name, **_whose(spec)} for name, spec in shown.tasks.items()]
    print_rows(rows, as_json=False, text=["licence"], least=["origin", "licence"])
