"""`evaluate` and `compare`: what a model can do, and what it has kept of another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmix.cli.common import line, note, percent, print_json, result
from calmix.cli.tables import print_table
from calmix.cli.verbs import group, verb
from calmix.errors import InputError
from calmix.evaluation.suites import Measure
from calmix.files import check_output_file, user_path, write_text
from calmix.options import MODEL, Json, ModelOptions, Options, option, path_option
from calmix.progress import Progress

if TYPE_CHECKING:
    from calmix.evaluation.distance import Flipped
    from calmix.evaluation.retention import Estimate
    from calmix.evaluation.scores import CapabilityScores
    from calmix.evaluation.suites import TaskSpec

BESIDE = 3  # models whose intervals fit next to each other into 80 columns
UNITS = "Bits and smoothed: bits per byte, lower is better; other scores: higher."
DENSE = "Dense model, or a .json file of its scores."
evaluate = group("evaluate", default="run")


class RetentionOptions(Options):
    """How retention is computed from scores."""

    measure: Measure = option("primary", "What retention is of, e.g. accuracy.", metavar="NAME")


class EvaluateOptions(RetentionOptions, ModelOptions, Json):
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
    no_distance: bool = option(False, "Leave out the distance to the dense model.", advanced=True)
    batch_tokens: int | None = option(
        None, "Tokens per forward pass.", shown="2048", ge=1, advanced=True
    )
    no_cache: bool = option(False, "Score the dense model again.", advanced=True)
    overwrite: bool = option(False, "Replace the output file.")


class RescoreOptions(RetentionOptions, Json):
    file: Path = option(..., "A file of calmix evaluate -o.", argument=True)
    against: Path | None = option(None, "The dense model's file.", shown="the one in FILE")


class CompareOptions(RetentionOptions, Json):
    scores: tuple[Path, ...] = option(..., "Files of calmix evaluate -o.", argument=True)
    against: Path | None = option(None, "The dense model's file.", shown="the one in SCORES")


class AnswerOptions(ModelOptions):
    models: tuple[str, ...] = option(..., "Models, the dense one first.", argument=True)
    output: Path = path_option("JSON file to write.")
    prompts: Path | None = option(None, "Prompts of your own: .txt, .jsonl or .parquet.",
                                  shown="ten plain questions")  # fmt: skip
    overwrite: bool = option(False, "Replace the output file.")


class PerplexityOptions(ModelOptions, Json):
    model: str = option(..., MODEL, argument=True)
    text: Path = option(..., "A .txt, .jsonl or .parquet file.")
    length: int = option(2048, "Tokens per window.", ge=2)
    separator: str = option("", "Text between the documents of the file.", advanced=True)


class SuiteOptions(Json):
    name: str = option(..., "Suite by name, or a YAML file.", argument=True)
    new: bool = option(False, "Write a suite of your own to start from: NAME.yaml and its rows.")


@verb("run", of=evaluate)
def run(options: EvaluateOptions) -> None:
    """Score a model on a suite; with --against, report what it kept, with intervals."""
    from calmix.calibration import open_tokenizer
    from calmix.calibration.texts import builtin_readers, parse_texts, texts
    from calmix.evaluation import evaluate as capability
    from calmix.evaluation.behaviour import behaviour
    from calmix.evaluation.distance import distance, reference
    from calmix.evaluation.measures import RIGHT_OR_WRONG
    from calmix.evaluation.scores import check_same_suite, describe, load_scores
    from calmix.evaluation.suites import suite_file
    from calmix.models import OpenModel, check_models, open_model

    model, against, output = options.model, options.against, options.output
    chosen = capability.choose(
        options.suite, dimensions=options.dimension, tasks=options.task, quick=options.quick,
        limit=options.limit,
    )  # fmt: skip
    chosen, left_out = capability.runnable(chosen, options.allow_code_execution)
    capability.check_code(chosen, options.allow_code_execution)
    if left_out:
        note(f"not run: {', '.join(left_out)}, which need --allow-code-execution")
    saved = against is not None and against.lower().endswith(".json")
    own = parse_texts(options.text)
    if own and (against is None or saved):
        raise InputError("--text measures the distance to a dense model: name it with --against")
    if own and options.no_distance:
        raise InputError("--text measures the distance, which --no-distance leaves out")
    how = options.opening()
    named = [model] if against is None or saved else [model, against]
    if output is not None:
        rows = [task.file for task in chosen.tasks.values()]
        inputs = [model, against, suite_file(options.suite), *own.values(), *rows]
        check_output_file(output, inputs=inputs, overwrite=options.overwrite)
    check_models(*named, **how)

    def score(opened: OpenModel, dense: bool) -> CapabilityScores:
        with Progress() as bar:
            return capability.evaluate(
                opened, chosen, batch_tokens=options.batch_tokens,
                allow_code_execution=options.allow_code_execution,
                floors=dense or against is None, cache=dense and not options.no_cache,
                progress=bar.of(f"scoring {opened.name}"),
            )  # fmt: skip

    # All is read, and refused if it does not fit, before anything is scored.
    dense, kept_of = None, None
    if against is not None and saved:
        dense = load_scores(user_path(against))
        check_same_suite(describe(chosen), dense.suite)
        dense.retention(dense, measure=options.measure, resamples=1)
    for name in named:
        open_tokenizer(name, trust_remote_code=options.trust_remote_code)
    if against is not None and not saved:
        whole = open_model(against, **how)
        by_likelihood = not options.no_distance and any(
            one.primary not in RIGHT_OR_WRONG for one in chosen.tasks.values())  # fmt: skip
        known = [n for n in chosen.dimensions if n in builtin_readers() and by_likelihood]
        if known or own:
            held_out = texts(whole, own, dimensions=known)
            kept_of = reference(whole, held_out, cache=not options.no_cache)
        dense = score(whole, True)
        del whole
    pruned = open_model(model, **how)
    found = None
    if kept_of is not None:
        with Progress() as bar:
            found = distance(
                pruned, kept_of, dense=lambda: open_model(str(against), **how),
                progress=bar.of("distance to the dense model"),
            ).to_dict()  # fmt: skip
    scores = replace(score(pruned, False), distance=found, not_run=tuple(left_out))
    made: dict[str, Any] = {"scores": scores.to_dict()}
    if dense is not None:
        kept = scores.retention(dense, measure=options.measure)
        made |= {"dense": dense.to_dict(), "retention": kept.to_dict(),
                 "behaviour": asdict(behaviour((dense, scores)))}  # fmt: skip
    if output is not None:
        write_text(output, json.dumps(made, ensure_ascii=False) + "\n")
    if options.as_json:
        print_json(made)
        return
    _print(scores, dense, options)
    for name, count in scores.truncated.items():
        note(f"task {name}: {count} requests were cut to fit the model's context")
    if output is not None:
        note(f"wrote {output}")


@verb("rescore", of=evaluate)
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
        print_json(scores.retention(dense, measure=options.measure).to_dict())


@verb("compare")
def compare(options: CompareOptions) -> None:
    """Put the retention of several models next to each other, dimension by dimension."""
    from calmix.evaluation.behaviour import behaviour, likelihood
    from calmix.evaluation.distance import flips
    from calmix.evaluation.scores import load_dense, load_scores
    from calmix.report import words

    files = options.scores
    # A folder of calmix compress is known by its own name.
    names = [path.resolve().parent.name if path.stem in ("scores", "abilities") else path.stem
             for path in files]  # fmt: skip
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two files are called {doubles[0]}: rename one, to tell them apart")
    dense = load_dense(files[0]) if options.against is None else load_scores(options.against)
    if dense is None:
        raise InputError(
            f"{files[0]} was scored without a dense model: name its file with --against"
        )
    models = [load_scores(path) for path in files]
    for path in files:  # each may have been scored against another
        own = load_dense(path)
        if own is not None and own.fingerprint != dense.fingerprint:
            raise InputError(
                f"{path} was scored against {own.model}, which is not the dense model of the "
                f"others ({dense.model}): compare it by itself"
            )
    kept = [one.retention(dense, measure=options.measure) for one in models]
    if options.as_json:
        print_json({name: one.to_dict() for name, one in zip(names, kept, strict=True)})
        return
    found = [behaviour((dense, one)) for one in models]
    for at, (name, one) in enumerate(zip(names, models, strict=True)):
        told = words.verdict(found[at], likelihood(dense, one),
                             words.measuring(one.model, dense.model))  # fmt: skip
        if at and found[at].answers is None:  # said of the first
            told = told[1:]
        line(words.wrapped(f"{name}: {' '.join(told)}", rest="  "))
    line("")
    suite, far = dense.suite, [(one.distance or {}).get("total") for one in models]
    rows = {}
    if found[0].answers is not None:
        rows["answers kept"] = [interval(one.answers.share) for one in found if one.answers]
    rows |= {one.name: [interval(each.of(one.name)) for each in kept] for one in kept[0].dimensions}
    rows["total"] = [interval(each.total) for each in kept]
    rows["worst"] = [each.worst or "-" for each in kept]
    if all(one.choices for one in found):
        rows["accuracy %"] = [interval(one.choices.accuracy[1]) for one in found if one.choices]
    if any(far):
        rows["KL to dense"] = [_far(one).get("KL", "-") for one in far]
        rows["top-1 %"] = [_far(one).get("top-1 %", "-") for one in far]
    rows["flips %"] = [_share(flips(dense.tasks, one.tasks).total) for one in models]
    title = (f"retention %, suite {suite['name']} version {suite['version']}, by "
             f"{options.measure}; KL and flips: lower is better")  # fmt: skip
    table: list[dict[str, str] | None] = []
    if len(models) <= BESIDE:
        for label, cells in rows.items():
            if label in ("total", "accuracy %", "KL to dense"):
                table.append(None)
            table.append({"": label, **dict(zip(names, cells, strict=True))})
    else:  # a row a model, the intervals but the total's left out
        table += [
            {"": name} | {label: cells[at] if label == "total" else cells[at].split(" ")[0]
                          for label, cells in rows.items()}
            for at, name in enumerate(names)
        ]  # fmt: skip
    least = ["accuracy %", "top-1 %", "flips %", "worst", "KL to dense"]
    print_table(table, title=title, least=least if len(models) > BESIDE else [])
    _legend()


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


Row = dict[str, Any] | str | None


def _headed(tasks: Sequence[Any], of: Callable[[Any], str], row: Callable[[Any], Row]) -> list[Row]:
    """Return a row a task, under its dimension's name."""
    return [one for name, own in groupby(tasks, of) for one in (name, *map(row, own))]


def _print(
    scores: CapabilityScores, dense: CapabilityScores | None, options: RetentionOptions
) -> None:
    """Print scores, or what they are of a dense model's."""
    title = f"suite {scores.suite['name']} version {scores.suite['version']}, {scores.dtype}"
    if dense is not None:
        _print_retention(scores, dense, options, title)
        return
    rows = _headed(
        score_rows(scores, options.measure), lambda row: row["dimension"],
        lambda row: {
            "task": f"  {row['task']}", "scored by": row["score"], "n": row["n"],
            "baseline": _number(row["floor"]), "score": _number(row["value"]),
            "signal": "yes" if row["signal"] else "no", "accuracy": _number(row["accuracy"]),
        },
    )  # fmt: skip
    print_table(rows, title=f"{scores.model}: {title}, {scores.seconds:.0f} s",
                least=["scored by", "baseline", "accuracy", "n"])  # fmt: skip
    line(UNITS)


def _print_retention(
    scores: CapabilityScores, dense: CapabilityScores, options: RetentionOptions, title: str
) -> None:
    from calmix.evaluation.behaviour import behaviour, likelihood
    from calmix.report import words

    kept = scores.retention(dense, measure=options.measure)
    found = behaviour((dense, scores))
    for said in words.verdict(found, likelihood(dense, scores),
                              words.measuring(scores.model, dense.model)):  # fmt: skip
        line(words.wrapped(said))
    line("")
    if found.abilities:
        counts = [{"ability": one.name, "asked": one.asked, "dense right": one.dense,
                   "still right": one.kept, "kept %": interval(one.share), "gained": one.gained}
                  for one in found.abilities]  # fmt: skip
        print_table(counts, title="generated answers, higher is better", least=["asked", "gained"])
    rows = _headed(
        kept.tasks, lambda task: task.dimension,
        lambda task: {
            "task": f"  {task.name}", "n": task.items, "scored by": task.score,
            "dense": _number(task.dense), "pruned": _number(task.pruned),
            "accuracy": "-" if task.dense_accuracy is None
            else f"{_number(task.dense_accuracy)} {_number(task.pruned_accuracy)}",
            "retention %": interval(task.kept) if task.signal else "no signal",
        },
    )  # fmt: skip
    print_table(rows, title=f"{scores.model} against {dense.model}: {title}",
                least=["scored by", "n", "accuracy", "dense", "pruned"])  # fmt: skip

    summary: list[Row] = [
        {"dimension": one.name, "tasks": f"{one.tasks - len(one.without_signal)} of {one.tasks}",
         f"by {options.measure}": interval(one.kept)}
        for one in kept.dimensions
    ]  # fmt: skip
    summary += [None, {"dimension": "total", f"by {options.measure}": interval(kept.total)}]
    if kept.worst is not None:
        worst = kept.of(kept.worst)
        summary.append({"dimension": f"worst: {kept.worst}",
                        f"by {options.measure}": interval(worst)})  # fmt: skip
    print_table(summary, title="retention %, higher is better, mean over tasks with signal")
    if silent := [task.name for task in kept.tasks if not task.signal]:
        line("no signal (dense score within its noise of the baseline, left out): "
             + ", ".join(silent))  # fmt: skip
    _legend()
    _print_distance(scores, dense)


def _print_distance(scores: CapabilityScores, dense: CapabilityScores) -> None:
    """Print KL to the dense model on texts, if measured, and flips on items."""
    from calmix.evaluation.distance import flips

    changed = flips(dense.tasks, scores.tasks)
    far = scores.distance
    parts = far["dimensions"] if far else {}

    def row(name: str, found: Any, share: Flipped | None) -> Row:
        return {"text": name, **_far(found), "flips %": _share(share)}

    names = dict.fromkeys([*parts, *changed.dimensions])
    rows = [row(name, parts.get(name), changed.dimensions.get(name)) for name in names]
    rows += [None, row("total", far["total"] if far else None, changed.total)]
    print_table(rows, title="distance to the dense model, lower is better; of top-1 higher",
                least=["median", "99 %", "top-1 %"])  # fmt: skip
    if far is None:
        line("KL: not measured; it takes --against MODEL, not scores, and likelihood tasks")
    else:
        line("KL(dense || pruned) in nats a token; flips: items right under one alone")


def _far(found: dict[str, Any] | None) -> dict[str, str]:
    """Return a distance in cells."""
    if found is None:
        return {}
    mean = f"{found['kl_mean']:.3f}"
    if found["kl_low"] is not None:
        mean += f" [{found['kl_low']:.3f}, {found['kl_high']:.3f}]"
    return {"KL": mean, "median": f"{found['kl_median']:.3f}", "99 %": f"{found['kl_p99']:.2f}",
            "top-1 %": percent(found["top1"])}  # fmt: skip


def _share(found: Flipped | None) -> str:
    return "-" if found is None else interval(found.share)


def _legend() -> None:
    from calmix.evaluation.retention import RESAMPLES

    line(UNITS)
    line("Retention: 100 = dense model; 0 = no task knowledge, chance, or no answer kept.")
    line(f"Brackets: 95 %, over items, {RESAMPLES} resamples, seed 0.")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def interval(value: Estimate) -> str:
    """Return an estimate in per cent with its interval."""
    if value.value is None:
        return "-"
    return f"{percent(value.value)} [{percent(value.low)}, {percent(value.high)}]"


@verb("answers", of=evaluate)
def answers(options: AnswerOptions) -> None:
    """Put the answers of several models to ten plain questions side by side, greedily."""
    from calmix.evaluation.generations import (
        TOKENS,
        Answered,
        answer,
        panel,
        read_prompts,
    )  # fmt: skip
    from calmix.models import check_models, open_model
    from calmix.report import words
    from calmix.sources.registry import local_file

    models, prompts, output = options.models, options.prompts, options.output
    how = options.opening()
    read = None if prompts is None else local_file(str(prompts)).path
    check_output_file(output, inputs=[*models, read], overwrite=options.overwrite)
    check_models(*models, **how)
    asked = panel() if prompts is None else read_prompts(prompts)
    named, written = [], []
    for name in models:
        opened = open_model(name, **how)
        with Progress() as bar:
            written.append(answer(opened, asked, progress=bar.of(f"{name} answers")))
        named.append((name, opened.fingerprint))
    Answered(tuple(asked), tuple(named), tuple(written)).save(output)
    line(words.beside([words.short(name, 36) for name in models]))
    for prompt, *texts in zip(asked, *written, strict=True):
        line(f"\n{words.wrapped(prompt.shown)}\n{words.beside(texts)}")
    note(f"wrote {output}: greedy answers, cut at {TOKENS} tokens")


@verb("perplexity", of=evaluate)
def perplexity(options: PerplexityOptions) -> None:
    """Perplexity and bits per byte of a text, in non-overlapping windows of one length."""
    from calmix.evaluation.perplexity import perplexity as measure
    from calmix.models import check_models, open_model
    from calmix.sources.registry import local_file

    documents = local_file(str(options.text)).read()
    whole = options.separator.join(document.text for document in documents)
    check_models(options.model, **options.opening())
    opened = open_model(options.model, **options.opening())
    with Progress() as bar:
        made = measure(opened, whole, length=options.length, tick=bar.of("scoring windows"))
    result(
        options, {"model": options.model, "text": str(options.text)} | asdict(made),
        f"perplexity {made.perplexity:.3f}, {made.bits_per_byte:.4f} bits per byte "
        f"(lower is better; context {made.length}, {made.windows} windows)",
    )  # fmt: skip


@verb("suites", of=evaluate)
def suites(options: Json) -> None:
    """List the builtin suites; the path of a YAML file is a suite too."""
    from calmix.evaluation.suites import builtin_suites

    rows = []
    for each in builtin_suites().values():
        whose = {name: _whose(spec) for name, spec in each.tasks.items()}
        closed = [name for name, told in whose.items() if told["use"] == "non-commercial"]
        row: dict[str, Any] = {
            "name": each.name, "version": each.version, "dimensions": ", ".join(each.dimensions),
            "tasks": len(each.tasks), "not for commercial use": ", ".join(closed),
            "description": each.description,
        }  # fmt: skip
        rows.append(row | ({"task": whose} if options.as_json else {}))
    print_table(
        rows, as_json=options.as_json, text=["dimensions", "not for commercial use", "description"],
        least=["not for commercial use", "tasks"],
    )  # fmt: skip


def _whose(spec: TaskSpec) -> dict[str, str]:
    """Return licence, permitted use and origin of a task's items."""
    from calmix.evaluation.suites import provenance
    from calmix.sources.licences import use_of

    found = provenance(spec)
    return {**found, "use": use_of(found["licence"])}


@verb("suite", of=evaluate)
def suite(options: SuiteOptions) -> None:
    """Show a suite's tasks, which also checks a file of your own."""
    from calmix.evaluation.suites import load_suite

    if options.new:
        from calmix.evaluation.own import template

        name = Path(re.sub(r"\.ya?ml$", "", options.name))
        files = {name.with_name(file): text for file, text in template(name.name).items()}
        for path in files:
            check_output_file(path, inputs=[], overwrite=False)
        for path, text in files.items():
            write_text(path, text)
        line(f"wrote {', '.join(map(str, files))}; calmix evaluate suite {name}.yaml checks them")
        return
    shown = load_suite(options.name)
    whose = {name: _whose(spec) for name, spec in shown.tasks.items()}
    if options.as_json:
        told = shown.model_dump(mode="json", exclude_none=True)
        print_json({**told, "hash": shown.hash, "provenance": whose})
        return

    def row(name: str) -> Row:
        spec = shown.tasks[name]
        which = "even" if spec.items == "even" else "all"
        return {
            "task": f"  {name}", "metric": spec.metric,
            "shots": "own" if spec.shots is None else spec.shots,
            "items": which if spec.limit is None else f"{which}, {spec.limit}",
            "quick": spec.quick if spec.quick is not None else spec.limit or "all",
            "chance": spec.chance,
            "data": spec.archive or spec.asked or spec.file,
        }  # fmt: skip

    print_table(
        _headed(list(shown.tasks), shown.dimension_of, row), text=["data"],
        title=f"{shown.name} version {shown.version}: {shown.description}",
        least=["chance", "shots", "metric", "data"],
    )  # fmt: skip
    print_table([{"task": name, **told} for name, told in whose.items()], text=["licence"],
                least=["origin", "licence"])  # fmt: skip
