"""`evaluate` and `compare`: scores of a model, and its retention of a dense one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmix.cli.common import line, note, print_json, print_table
from calmix.cli.verbs import group, verb
from calmix.errors import CalmixError, InputError
from calmix.evaluation import suites
from calmix.evaluation.answers import Answers, compare_answers
from calmix.evaluation.choosing import MARGIN, Candidate, Choice, choose_smallest, comparable
from calmix.evaluation.journal import journal_beside
from calmix.evaluation.measures import BITS, PRIMARY, RIGHT_OR_WRONG
from calmix.evaluation.prompts import calibration_hash, read_prompts
from calmix.evaluation.retention import RESAMPLES, Retention
from calmix.evaluation.scores import (
    CapabilityScores,
    load_dense,
    load_pair,
    write_scores,
)
from calmix.evaluation.served import Served, connect
from calmix.files import check_output_file, user_path, write_json, write_text
from calmix.manifest import lineage, read_if_there, record_file
from calmix.models.hub import is_served
from calmix.options import (
    MEASURE,
    RUN_CODE,
    SERVED,
    Measure,
    ModelOptions,
    ServerOptions,
    Share,
    advanced,
    flags,
    option,
    path_option,
)
from calmix.progress import Progress
from calmix.sources.licences import NON_COMMERCIAL, use_of
from calmix.sources.registry import local_file

if TYPE_CHECKING:
    from calmix.evaluation.comparison import Comparison

MOST_COLUMNS = 3  # models whose intervals fit side by side in 80 columns
BRACKETS = (
    "KL(dense || pruned): nats per token; flips: items right under one model only.\n"
    f"Brackets: 95 % intervals over items, {RESAMPLES} resamples, seed 0."
)
UNITS_OF_BITS = "bits and smoothed: bits per byte, lower is better; others: higher is better."
RETENTION = "Retention: 100 = dense model; 0 = no task knowledge, chance, or no answer kept."
RIGHT = "100 = as many right answers as the dense model; total: mean over abilities."
DENSE = "Dense model, or a .json file of its scores."
PROMPTS_OPTION = option(None, "Your own prompts instead of a suite: mine.jsonl.", metavar="FILE")
THINKING_OPTION = option(False, "Let models think first, if their template has the switch.")
TEST_HALF = option(
    False, "Only the half of --prompts kept from calibration; so if a model saw the other."
)
PAGE_OPTION = option(None, "HTML page to write: answers side by side.", metavar="PATH")
evaluate = group("evaluate", default="run")


@verb("run", of=evaluate)
def run(
    opening: ModelOptions,
    serving: ServerOptions,
    model: str = option(..., SERVED, argument=True, names="model"),
    suite: str | None = option(None, "Suite by name, or a YAML file.", shown="offline"),
    prompts: str | None = PROMPTS_OPTION,
    test_half: bool = TEST_HALF,
    thinking: bool = THINKING_OPTION,
    against: str | None = option(None, DENSE, metavar="DENSE", names="model"),
    output: Path | None = path_option(None, "JSON file to write, with every item."),
    page: Path | None = PAGE_OPTION,
    quick: bool = option(False, "Only the suite's quick slice."),
    whole: tuple[str, ...] = advanced((), "With --quick: all items of this dimension (repeat)."),
    limit: int | None = option(None, "Items per task at most, e.g. 50.", ge=1),
    dimension: tuple[str, ...] = option((), "Only this dimension (repeat)."),
    task: tuple[str, ...] = option((), "Only this task (repeat)."),
    without: tuple[str, ...] = option((), "Skip this task (repeat).", metavar="TASK"),
    allow_code_execution: bool = RUN_CODE,
    text: tuple[str, ...] = advanced(
        (), "Text to measure the distance on: code=mine.jsonl (repeat).", metavar="NAME=PATH"
    ),
    repeat: bool = advanced(
        False, "Generate the dense model's answers twice, also with --quick or alone."
    ),
    no_repeat: bool = advanced(False, "Generate the dense model's answers only once."),
    no_distance: bool = advanced(False, "Skip the distance to the dense model."),
    no_cache: bool = advanced(False, "Ignore cached results of the dense model."),
    measure: Measure | None = MEASURE,
    overwrite: bool = option(False, "Replace the output file."),
) -> None:
    """Score a model on a suite or on your own prompts; with --against, report what it kept."""
    wanted = _suite(suite, prompts, test_half, [model]) or "offline"
    servers = _servers([model, *([against] if against else [])], serving)
    chosen = suites.choose(
        wanted,
        dimensions=dimension,
        tasks=task,
        without=without,
        quick=quick,
        whole=whole,
        limit=limit,
    )
    whole_part = _thoughtful(chosen, thinking)
    chosen, left_out = suites.runnable(whole_part, allow_code_execution)
    # Only now, because they take seconds to import.
    from calmix.calibration.distance_texts import parse_texts
    from calmix.evaluating import evaluate_against, named_or_scored
    from calmix.evaluation.comparison import scores_record
    from calmix.evaluation.summary import answers_page

    # All inputs are read and checked before anything is scored.
    large, own_texts = against and named_or_scored(against), parse_texts(text)
    dense, original = (None, large) if isinstance(large, str) else (large, None)
    if own_texts and (original is None or no_distance):
        raise InputError(
            "--text measures the distance to a dense model: name it with --against, and leave out "
            "--no-distance"
        )
    if own_texts and chosen.own:
        raise InputError("--text has no effect with --prompts: KL is measured on the answers")
    if measure == PRIMARY and not chosen.asks:
        raise InputError("--measure right needs generated answers: try --suite abilities")
    if repeat and (no_repeat or not chosen.asks or dense is not None):
        why = "scores in a file" if dense is not None else "a suite without generated answers"
        why = "--no-repeat" if no_repeat else why
        raise InputError(f"--repeat has no effect with {why}: leave it out")
    if page is not None and (against is None or not chosen.own):
        raise InputError("--page shows answers to --prompts beside those of --against: name both")
    if dense is not None:
        _kept(dense, dense, measure)
    for path in filter(None, (output, page)):
        rows = [*own_texts.values(), *(one.file for one in chosen.tasks.values() if one.file)]
        read = [local_file(str(one)).path for one in rows]
        inputs = [model, against, suite and suites.suite_file(suite), *read]
        check_output_file(path, inputs=inputs, overwrite=overwrite)
    models = _models([model, *([original] if original else [])], opening, servers)
    if left_out:
        note(f"not run: {', '.join(left_out)}, which need --allow-code-execution")
    with journal_beside(output, note) as journal, Progress() as bar:
        scores, dense = evaluate_against(
            models[model],
            whole_part,
            dense or (original and models[original]),
            texts=own_texts,
            distance=not no_distance,
            allow_code_execution=allow_code_execution,
            repeat=repeat or not (quick or no_repeat or original is None),
            cache=not no_cache,
            journal=journal,
            bar=bar,
            **opening.opening(),
        )
    result = scores_record(scores, dense, measure)
    if output is not None:
        write_scores(output, result)
    if page is not None and dense is not None:
        write_text(page, answers_page({scores.model: (dense, scores)}))
    print_json(result)
    _print(scores, dense, measure)
    for one in scores.tasks:
        if chosen.tasks[one.name].writes and not one.values:
            note(f"task {one.name} was not asked: the chat template of {model} has no tools")
    for name, count in scores.truncated.items():
        note(f"task {name}: {count} requests were cut to fit the model's context")
    for path in filter(None, (output, page)):
        note(f"wrote {path}")


def _suite(
    suite: str | None, prompts: str | None, test_half: bool, models: Sequence[str]
) -> suites.Suite | str | None:
    """Return the suite of a user's prompts, or the name of one; None if neither was given."""
    if prompts is None:
        if test_half:
            raise InputError("--test-half has no effect without --prompts: leave it out")
        return suite
    if suite is not None:
        raise InputError("--prompts and --suite cannot be combined: leave one out")
    own = calibration_hash(read_prompts(prompts, note))
    seen = {} if test_half else {name: _prompts_seen(name) for name in models}
    if calibrated := [name for name, hashes in seen.items() if own in hashes]:
        note(f"{calibrated[0]} was calibrated on half of these prompts: only the others are asked")
        test_half = True
    elif others := [name for name, hashes in seen.items() if hashes]:
        note(
            f"{others[0]} was calibrated on half of another file of prompts: if it shares prompts "
            "with this one, --test-half asks only those kept from calibration"
        )
    return suites.prompt_suite(prompts, test_half=test_half)


def _prompts_seen(model: str) -> set[str]:
    """Return the hashes of the prompts in a model's calibration text, by its record."""
    path = user_path(model)
    record = record_file(path)
    if record is None or record == path:
        return set()
    drawn = [one.get("calibration") for one in lineage(read_if_there(record))]
    parts = [((one or {}).get("written") or {}).get("prompts") or one or {} for one in drawn]
    return {one["settings"]["prompts_sha256"] for one in parts if one.get("generated") == "prompts"}


def _thoughtful(suite: suites.Suite, thinking: bool) -> suites.Suite:
    """Return a suite in which models think first: only its tasks that are asked as chats."""
    from calmix.evaluation.tasks import load_items

    if not thinking:
        return suite
    chats = [
        name
        for name, spec in suite.tasks.items()
        if spec.writes and any(one.messages is not None for one in load_items(spec))
    ]
    if not chats:
        raise InputError(
            f"--thinking has no effect: no task of suite {suite.name} is asked as a chat; try "
            "--suite abilities or --prompts"
        )
    if others := [name for name in suite.tasks if name not in chats]:
        note(f"--thinking leaves out tasks that are not asked as chats: {', '.join(others)}")
    return suites.choose(suite, tasks=chats).model_copy(update={"thinking": True})


def _servers(names: Sequence[str], serving: ServerOptions) -> dict[str, Served]:
    """Ask the servers among models what they serve."""
    servers = {name: connect(name, serving) for name in names if is_served(name)}
    if serving.model_name and not servers:
        raise InputError("--model names what a server serves, and no http:// address is given")
    return servers


def _models(
    names: Sequence[str], opening: ModelOptions, servers: Mapping[str, Served]
) -> dict[str, str | Served]:
    """Return models by name as `evaluate_against` takes them."""
    from calmix.models.opening import check_models

    check_models(*(name for name in names if name not in servers), **opening.opening())
    return {name: servers.get(name, name) for name in names}


@verb("rescore", of=evaluate)
def rescore(
    file: Path = option(..., "A file of calmix evaluate -o.", argument=True, names="path"),
    against: Path | None = option(None, "Dense model's scores.", shown="those in FILE"),
    measure: Measure | None = MEASURE,
) -> None:
    """Recompute scores and retention of a file by another measure, without the model."""
    dense, scores = load_pair(file)
    dense = dense if against is None else load_dense(against)
    retained = _kept(scores, dense, measure)
    print_json(
        retained.to_dict()
        if dense is not None
        else [
            {
                "dimension": task.dimension,
                "task": task.name,
                "n": task.items,
                "score": task.score,
                "baseline": task.baseline,
                "value": task.dense,
                "noise": task.noise,
                "signal": task.signal,
                "accuracy": task.dense_accuracy,
            }
            for task in retained.tasks
        ]
    )
    _print(scores, dense, measure)


@verb("compare")
def compare(
    opening: ModelOptions,
    serving: ServerOptions,
    scores: tuple[str, ...] = option(
        ...,
        "Files of calmix evaluate -o or folders of calmix compress; with --prompts or --suite "
        "models, the dense one first.",
        argument=True,
    ),
    against: Path | None = option(None, "Dense model's scores.", shown="those in SCORES"),
    measure: Measure | None = MEASURE,
    prompts: str | None = PROMPTS_OPTION,
    test_half: bool = TEST_HALF,
    thinking: bool = THINKING_OPTION,
    suite: str | None = option(None, "Suite to score models on, e.g. abilities."),
    quick: bool = option(False, "Only the suite's quick slice."),
    limit: int | None = option(None, "Items per task at most, e.g. 50.", ge=1),
    margin: Share = option(MARGIN, "Share of good answers a model may be worse by."),
    allow_code_execution: bool = RUN_CODE,
    output: Path | None = path_option(None, "JSON file to write, with --prompts or --suite."),
    page: Path | None = PAGE_OPTION,
    overwrite: bool = option(False, "Replace the output file."),
) -> None:
    """Compare several smaller models of one dense model; with --prompts or --suite, score them."""
    chosen = _suite(suite, prompts, test_half, scores)
    servers = _servers(scores, serving) if chosen is not None else {}
    if chosen is not None:
        if against is not None or measure is not None:
            raise InputError("--against and --measure are for files: name the dense model first")
        full = _thoughtful(suites.choose(chosen, quick=quick, limit=limit), thinking)
        if not (written := [name for name, one in full.tasks.items() if one.writes]):
            raise InputError(f"suite {full.name} has no generated answers: try abilities")
        if len(scores) < 2 or len({*scores}) < len(scores):
            raise InputError("name the dense model, then one or more others, each once")
        if page is not None and not full.own:
            raise InputError("--page shows answers to --prompts: leave it out with --suite")
        chosen = suites.choose(full, tasks=written)
        answered, left_out = suites.runnable(chosen, allow_code_execution)
        if left_out:
            note(f"not run: {', '.join(left_out)}, which need --allow-code-execution")
        _compare_models(scores, answered, opening, servers, margin, output, page, overwrite)
        return
    known = {"scores", "against", "measure", "margin", "as_json"}
    for name in sorted(opening.model_fields_set - known):
        flag = flags(type(opening), name)[0]
        raise InputError(f"{flag} needs --prompts or --suite, which score models")
    files, models = dict[str, list[Path]](), dict[str, Path | None]()
    for name in map(str, scores):
        if name.startswith("builtin:") or name.lower().endswith(".gguf"):
            raise InputError(
                f"{name} is a model: compare models with --prompts FILE or --suite NAME"
            )
    if missing := next((path for path in map(user_path, scores) if not path.exists()), None):
        raise InputError(f"there is no file or folder {missing}")
    from calmix import words
    from calmix.evaluation.comparison import Comparison, read_pairs
    from calmix.evaluation.summary import against_itself, measuring, summary_lines
    from calmix.models.opening import size_of

    for path in map(user_path, scores):
        name, files_of, model = _result(path)
        if name in files:
            raise InputError(f"two files are called {name}: rename one")
        files[name], models[name] = files_of, model
    reference = None if against is None else load_dense(against)
    comparisons, candidates = list[Comparison](), list[Candidate]()
    for name, pairs in read_pairs(files, reference, note).items():
        prompted = [pair for pair in pairs if all(task.prompts for task in pair[0].tasks)]
        scored = [pair for pair in pairs if pair not in prompted] or pairs
        comparisons.append(Comparison.of(name, scored, measure))
        generated = [pair for pair in scored if any(task.written for task in pair[0].tasks)]
        for pair in (prompted or generated)[:1]:
            place = models[name] or user_path(pair[1].model)
            size = bits = None
            with suppress(CalmixError):  # what has the model's name now may be another thing
                size, bits = size_of(str(place)) if place.exists() else (None, None)
            candidates.append(Candidate(name, pair, size, bits))
    print_json({one.name: one.to_dict() for one in comparisons})
    for one in comparisons:
        dense, small = one.pairs[-1]
        does, command = one.behaviour, measuring(small.model, dense.model)
        if does.answers is not None or one is comparisons[0]:
            line(words.wrapped(f"{one.name}: {summary_lines(does, None, command)[0]}", rest="  "))
    if ceiling := next(filter(None, (against_itself(one.behaviour) for one in comparisons)), ""):
        line(words.wrapped(ceiling))
    line("")
    _print_comparisons(comparisons)
    shared = comparable(candidates) if len(candidates) == len(comparisons) else []
    if measure is None and shared:
        _print_choice(shared, choose_smallest(shared, "the dense model", margin))


def _print_choice(candidates: Sequence[Candidate], choice: Choice) -> None:
    """Print several models' answers, and which model to use."""
    from calmix.evaluation.choosing import choice_text, model_rows
    from calmix.words import wrapped

    dense, small = candidates[0].pair
    rows = model_rows(candidates, choice)
    print_table(
        _unmarked(rows),
        title=f"suite {small.suite['name']}, against {dense.model}: "
        f"{candidates[0].counted.asked:,} answers"
        f"{', of all abilities' if len({task.dimension for task in small.tasks}) > 1 else ''}",
        least=["p", "tokens/s", "gained", "bits", "identical %", "KL", "lost"],
    )
    line(wrapped(choice_text(candidates, choice)))


def _compare_models(
    names: Sequence[str],
    suite: suites.Suite,
    opening: ModelOptions,
    servers: Mapping[str, Served],
    margin: float,
    output: Path | None,
    page: Path | None,
    overwrite: bool,
) -> None:
    """Score the first model and the others on a suite, and print which of them to use."""
    from calmix.evaluating import evaluate_against
    from calmix.evaluation.choosing import choice_text, model_rows, short_names
    from calmix.evaluation.comparison import scores_record
    from calmix.evaluation.summary import answers_page
    from calmix.models.opening import size_of

    for path in filter(None, (output, page)):
        rows = [local_file(one.file).path for one in suite.tasks.values() if one.file]
        check_output_file(path, inputs=[*names, *rows], overwrite=overwrite)
    models = _models(names, opening, servers)
    first, *others = names
    called_first, *shown = short_names(names)
    dense, candidates = None, list[Candidate]()
    with journal_beside(output, note) as journal, Progress(len(others)) as bar:
        for name, called in zip(others, shown, strict=True):
            bar.begin(called)
            again = suite.own and not any(map(is_served, (first, name)))  # for the distance
            with Progress() as inside:
                scores, dense = evaluate_against(
                    models[name],
                    suite,
                    models[first] if dense is None or again else dense,
                    allow_code_execution=True,  # `suite` has only tasks that may run
                    repeat=True,
                    journal=journal,
                    bar=inside,
                    **opening.opening(),
                )
            assert dense is not None
            place = models[name]
            speed = None
            if isinstance(place, Served):
                speed = place.tokens / place.seconds if place.tokens else None
                size, bits = place.size, place.bits
            else:
                size, bits = size_of(name)
            candidates.append(Candidate(called, (dense, scores), size, bits, speed))
    if not (shared := comparable(candidates)):
        raise InputError(
            "no task has answers of all these models: leave out those whose chat template has no "
            "tools"
        )
    choice = choose_smallest(shared, called_first, margin)
    result = {
        "dense": first,
        "choice": asdict(choice),
        "models": {
            one.name: {
                "size": one.size,
                "bits": one.bits,
                "speed": one.speed,
                **scores_record(one.pair[1], one.pair[0]),
            }
            for one in candidates
        },
    }
    if output is not None:
        write_json(output, result)
    if page is not None:
        table, text = model_rows(shared, choice), choice_text(shared, choice)
        write_text(page, answers_page({one.name: one.pair for one in candidates}, table, text))
    print_json(result)
    _print_choice(shared, choice)
    for path in filter(None, (output, page)):
        note(f"wrote {path}")


def _result(path: Path) -> tuple[str, list[Path], Path | None]:
    """Return the name of a result, its files of scores, and the model beside them, if there is one;
    a result of calmix compress is named after its folder."""
    from calmix.compression.folder import BEHAVIOUR, COMPRESSED, PROMPTS, SCORES
    from calmix.compression.plan import CompressRequest
    from calmix.compression.results import verified

    names = SCORES, BEHAVIOUR, PROMPTS
    if not path.is_dir():
        place = path.resolve()
        return place.parent.name if path.name in names else path.stem, [path], None
    if not (files := [path / name for name in names if (path / name).exists()]):
        raise InputError(
            f"{path} has neither {SCORES} nor {BEHAVIOUR}: name a folder that calmix compress has "
            "finished; or compare models with --prompts FILE or --suite NAME"
        )
    model = None
    if (path / COMPRESSED).is_file():
        model = path / CompressRequest(**verified(path)[0]["request"]).file
    return path.resolve().name, files, model


def _print_comparisons(comparisons: Sequence[Comparison], *, alone: bool = False) -> None:
    """Print what models keep by ability, and their distance to the dense model; `alone` without
    what `evaluate` prints before."""
    from calmix.evaluation.summary import comparison_row, distance_row

    by = comparisons[0].retention.measure
    if alone and by == PRIMARY:
        line(
            ", ".join(
                f"{name}: {cell}" for name, cell in distance_row(comparisons[0]).items() if cell
            )
        )
        line(BRACKETS)
        return
    records = [comparison_row(one, by, alone) | distance_row(one) for one in comparisons]
    labels = [
        label
        for label in dict.fromkeys(chain.from_iterable(records))
        if any(one.get(label) is not None for one in records)
    ]
    table: list[dict[str, Any] | None] = []
    if len(comparisons) <= MOST_COLUMNS:
        for label in labels:
            if label in ("total", "lost", "accuracy %", "KL to dense"):
                table.append(None)
            cells = {
                one.name: record.get(label)
                for one, record in zip(comparisons, records, strict=True)
            }
            table.append({"": label, **cells})
    else:  # one row per model; only the total has its interval
        for one, record in zip(comparisons, records, strict=True):
            cells = {
                label: record.get(label) if label == "total" else _value(record.get(label))
                for label in labels
            }
            table.append({"": one.name, **cells})
    suite = comparisons[0].pairs[-1][0].suite
    what, meaning = f"retention %, by {by}", RETENTION
    if by == PRIMARY:
        what, meaning = "right answers, % of the dense model's", RIGHT
    least = ["accuracy %", "top-1 %", "flips %", "worst", "likelihood %", "p", "KL to dense"]
    least += ["kept %", "gained", "lost"]
    if table:
        print_table(
            table,
            least=least if len(comparisons) > MOST_COLUMNS else [],
            title=f"{what}; suite {suite['name']} version {suite['version']}",
        )
    line(meaning)
    line(BRACKETS)


def _unmarked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of a page's table without the marks of columns of numbers."""
    return [{key.removeprefix("#"): cell for key, cell in row.items()} for row in rows]


def _value(cell: Any) -> Any:
    """Return a cell without its interval."""
    return cell.split(" [")[0] if isinstance(cell, str) else cell


def _kept(
    scores: CapabilityScores, dense: CapabilityScores | None, measure: Measure | None
) -> Retention:
    """Return retention against the dense model, or without one against the model itself."""
    if dense is None:
        return scores.retention(scores, measure or "primary", resamples=1)
    return scores.retention(dense, measure)


def _print(
    scores: CapabilityScores, dense: CapabilityScores | None, measure: Measure | None
) -> None:
    """Print scores and, with a dense model, what the model keeps of it."""
    from calmix.evaluation.comparison import Comparison
    from calmix.evaluation.summary import ability_rows, measuring, summary_lines
    from calmix.words import number, short, with_span, wrapped

    title = f"suite {scores.suite['name']} version {scores.suite['version']}, {scores.dtype}"
    if dense is None:
        rows = [
            {
                "dimension": task.dimension,
                "task": task.name,
                "scored by": task.score,
                "n": task.items,
                "baseline": number(task.baseline),
                "score": number(task.dense),
                "signal": "yes" if task.signal else "no",
                "accuracy": number(task.dense_accuracy),
            }
            for task in _kept(scores, None, measure).tasks
        ]
        print_table(
            rows,
            by="dimension",
            title=f"{scores.model}: {title}, {scores.seconds:.0f} s",
            least=["scored by", "baseline", "accuracy", "n"],
        )
        line(UNITS_OF_BITS)
        return
    if (changed := compare_answers((dense, scores))) is not None:
        _print_answers(changed, scores)
        if all(task.prompts for task in scores.tasks):
            return
    one = Comparison.of(short(scores.model), [(dense, scores)], measure)
    does = one.behaviour
    for text in summary_lines(does, one.likelihood, measuring(scores.model, dense.model)):
        line(wrapped(text))
    line("")
    if does.abilities:
        counts = _unmarked(ability_rows(does))
        print_table(counts, title="generated answers", least=["p", "asked"])
    generated = {task.name for task in scores.tasks if task.written and measure is None}
    tasks: list[dict[str, Any]] = [
        {
            "dimension": task.dimension,
            "task": task.name,
            "n": task.items,
            "scored by": "right" if task.name in generated else task.score,
            "dense": number(task.dense),
            "pruned": number(task.pruned),
            "accuracy": None
            if task.score in RIGHT_OR_WRONG or task.dense_accuracy is None
            else f"{number(task.dense_accuracy)} {number(task.pruned_accuracy)}",
            "retention %": None
            if task.name in generated
            else with_span(task.kept)
            if task.signal
            else "no signal",
        }
        for task in scores.retention(dense, measure or "primary").tasks
    ]
    print_table(
        tasks,
        by="dimension",
        title=f"{scores.model} against {dense.model}: {title}",
        least=["scored by", "n", "accuracy", "dense", "pruned"],
    )
    if any(row["retention %"] == "no signal" for row in tasks):
        line("no signal: left out, because the dense score is within noise of the baseline")
    if any(row["scored by"] in BITS for row in tasks):
        line(UNITS_OF_BITS)
    _print_comparisons([one], alone=True)


def _print_answers(answers: Answers, scores: CapabilityScores) -> None:
    """Print what changed in the answers to a user's prompts."""
    from calmix.evaluation.summary import answer_lines, fault_rows
    from calmix.words import wrapped

    for text in answer_lines(answers, scores.distance):
        line(wrapped(text))
    line("")
    rows = _unmarked(fault_rows(answers))
    print_table(rows, title="faults that a program can see", least=["repeat %", "p", "of"])


@verb("suites", of=evaluate)
def list_suites() -> None:
    """List the builtin suites; a YAML file is a suite too."""
    rows, full = [], []
    for each in map(suites.load_suite, suites.BUILTIN):
        origins = _origins(each)
        closed = [name for name, one in origins.items() if one["use"] == NON_COMMERCIAL]
        rows.append(
            {
                "name": each.name,
                "version": each.version,
                "dimensions": ", ".join(each.dimensions),
                "tasks": len(each.tasks),
                "not for commercial use": ", ".join(closed),
                "description": each.description,
            }
        )
        full.append({**rows[-1], "task": origins})
    print_json(full)
    print_table(
        rows,
        text=["dimensions", "not for commercial use", "description"],
        least=["not for commercial use", "tasks"],
    )


def _origins(suite: suites.Suite) -> dict[str, dict[str, str]]:
    """Return licence, permitted use and origin of each task's items."""
    origins = {name: suites.provenance(spec) for name, spec in suite.tasks.items()}
    return {name: {**one, "use": use_of(one["licence"])} for name, one in origins.items()}


@verb("suite", of=evaluate)
def show_suite(
    name: str = option(..., "Suite by name, or a YAML file.", argument=True),
    new: bool = option(False, "Write a suite to start from: NAME.yaml and its rows."),
) -> None:
    """Check a suite and show its tasks."""
    if new:
        stem = Path(re.sub(r"\.ya?ml$", "", name))
        files = {stem.with_name(file): text for file, text in suites.template(stem.name).items()}
        for path in files:
            check_output_file(path, overwrite=None)
        for path, text in files.items():
            write_text(path, text)
        line(f"wrote {', '.join(map(str, files))}; calmix evaluate suite {stem}.yaml checks them")
        return
    loaded = suites.load_suite(name)
    origins = _origins(loaded)
    fields = loaded.model_dump(mode="json", exclude_none=True)
    print_json({**fields, "hash": loaded.hash, "provenance": origins})
    rows = [
        {
            "dimension": dimension,
            "task": task,
            "metric": spec.metric,
            "shots": "own" if spec.shots is None else spec.shots,
            "items": ("even" if spec.items == "even" else "all")
            + ("" if spec.limit is None else f", {spec.limit}"),
            "quick": spec.quick if spec.quick is not None else spec.limit or "all",
            "chance": spec.chance,
            "data": spec.archive or spec.asked or spec.file,
        }
        for dimension, tasks in loaded.dimensions.items()
        for task, spec in tasks.items()
    ]
    print_table(
        rows,
        by="dimension",
        text=["data"],
        least=["chance", "shots", "metric", "data"],
        title=f"{loaded.name} version {loaded.version}: {loaded.description}",
    )
    print_table(
        [{"task": name, **one} for name, one in origins.items()],
        text=["licence"],
        least=["origin", "licence"],
    )
