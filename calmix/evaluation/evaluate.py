"""Evaluate a model on a suite, and keep what it did with each item.

Scores of a dense model are kept in the cache, because every comparison needs them again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from calmix.errors import InputError, nearest
from calmix.evaluation.abilities import ANSWER, ask, asked_texts, task_of
from calmix.evaluation.likelihood import Progress
from calmix.evaluation.measures import TaskScores, rounded
from calmix.evaluation.scorer import BATCH_TOKENS, Scorer
from calmix.evaluation.scores import CapabilityScores, describe, load_scores
from calmix.evaluation.suites import Suite, TaskSpec, load_suite
from calmix.evaluation.tasks import Item, accuracies, item_texts, load_items, task_texts
from calmix.manifest import deciding_versions
from calmix.models import OpenModel, open_model
from calmix.models.opening import end_tokens, in_chat
from calmix.precision import dtype_name

CUE = "Answer:"  # what stands in place of a question
SCORER = 2  # raised when the scorer gives other numbers, so that cached scores are not reused
FLOORS = 2  # the same of the scores without the question, which a dense model's alone hold


def choose(
    suite: Suite | str | Path,
    *,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    without: Sequence[str] = (),
    quick: bool = False,
    whole: Sequence[str] = (),
    limit: int | None = None,
) -> Suite:
    """Return the suite as it is to be run: of some dimensions and tasks, where any are named, and
    `without` others, at most `limit` items a task; each task's `quick` ones, but all of the
    dimensions `whole`."""
    full = suite if isinstance(suite, Suite) else load_suite(suite)
    for what, names, known in (
        ("dimension", dimensions, [*full.dimensions]),
        ("dimension", whole, [*dimensions] or [*full.dimensions]),
        ("task", [*tasks, *without], [*full.tasks]),
    ):
        if unknown := [name for name in names if name not in known]:
            hint = nearest(unknown[0], known)
            raise InputError(f"suite {full.name} has no {what} '{unknown[0]}': {hint}")
    if whole and not quick:
        raise InputError("--whole has no effect without --quick: leave it out")
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be at least 1 item a task, not {limit}")
    kept: dict[str, dict[str, TaskSpec]] = {}
    for dimension, own in full.dimensions.items():
        sliced = quick and dimension not in whole
        for name, task in own.items():
            if (
                (dimensions and dimension not in dimensions)
                or (tasks and name not in tasks)
                or name in without
                or (sliced and task.quick == 0)
            ):
                continue
            most = (task.quick if sliced else None) or task.limit
            values = {"limit": most if limit is None else min(limit, most or limit),
                      "quick": None if sliced else task.quick}  # fmt: skip
            kept.setdefault(dimension, {})[name] = task.model_copy(update=values)
    if not kept:
        raise InputError(f"no task of suite {full.name} is left: name fewer, or others")
    return full.model_copy(update={"dimensions": kept})


def runnable(suite: Suite, allowed: bool, *, whole: bool = False) -> tuple[Suite, list[str]]:
    """Return what of a suite is run, and the tasks left out: those that ask for programs, unless
    these may be run. An `InputError` if nothing is left or, with `whole`, if any is left out."""
    left = [name for name, task in suite.tasks.items() if task.runs_code and not allowed]
    if left and (whole or len(left) == len(suite.tasks)):
        raise InputError(
            f"task {', '.join(left)} runs code the model writes: pass --allow-code-execution "
            "(allow_code_execution=True) to run it in a limited subprocess, or leave it out "
            "with --task"
        )
    return choose(suite, without=left), left


def evaluate(
    model: OpenModel | str | Path,
    suite: Suite | str | Path = "offline",
    *,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    quick: bool = False,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    batch_tokens: int | None = None,
    allow_code_execution: bool = False,
    floors: bool = True,
    right: Mapping[str, Collection[str]] | None = None,
    cache: bool = False,
    progress: Progress | None = None,
) -> CapabilityScores:
    """Score a model on a suite.

    Args:
        model: a model's name, or one already open.
        suite: a suite, the name of a builtin one, or the path of a YAML file.
        dimensions, tasks: score only these; none named scores all.
        quick, limit: score the suite's quick slice; at most so many items a task.
        dtype, device, trust_remote_code: how to open the model, if it is given by name.
        batch_tokens: tokens in one forward pass; decides speed and memory, not scores.
        allow_code_execution: run code the model writes, in a limited subprocess. Without it,
            tasks of a suite that ask for programs are left out.
        floors: also score what a model without the knowledge would (`TaskScores.floors`), which
            a dense model's scores must hold; a pruned model's need not.
        right: by task, the only items that answers are asked for; all others count as wrong.
        cache: take the scores from the cache if this model's files were scored before, and
            keep them there otherwise. Leave it off for a model changed in memory: its files
            do not say so.
        progress: called with the work done and in all, in requests; an answer counts for several.

    Raises:
        InputError: unknown suite, dimension or task, an empty limit, code execution not allowed.
        ModelError: the model cannot be opened, or an answer is longer than it takes.
    """
    chosen = choose(suite, dimensions=dimensions, tasks=tasks, quick=quick, limit=limit)
    chosen, left = runnable(chosen, allow_code_execution)
    if isinstance(model, (str, Path)):
        model = open_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    size = batch_tokens or BATCH_TOKENS
    if cache and floors and right is None:
        about = *form_of(model, chosen), chosen.hash, size, SCORER, FLOORS
        kept = model.cached("scores", *about).with_suffix(".json")
        try:
            scores = load_scores(kept)
        except InputError:  # none there, or damaged
            scores = _run(model, chosen, size, floors, right, progress)
            scores.save(kept)
    else:
        scores = _run(model, chosen, size, floors, right, progress)
    form = "" if in_chat(model.tokenizer, "Hello") is None else "chat template"
    form = (form or "worked examples") if chosen.asks else ""
    return replace(scores, not_run=tuple(left), form=form, right_only=right is not None)


def form_of(model: OpenModel, suite: Suite) -> list[Any]:
    """Return what decides, beside weights and tokenizer, how a model is asked and when it ends."""
    if not suite.asks:
        return []
    return [str(getattr(model.tokenizer, "chat_template", None)), end_tokens(model)]


def _run(
    model: OpenModel,
    suite: Suite,
    batch_tokens: int,
    floors: bool,
    right: Mapping[str, Collection[str]] | None,
    progress: Progress | None,
) -> CapabilityScores:
    start = time.perf_counter()
    loaded = {name: load_items(spec) for name, spec in suite.tasks.items() if not spec.writes}
    scorer = Scorer(model, batch_tokens=batch_tokens, progress=progress)
    questions = {name: task_of(spec) for name, spec in suite.tasks.items() if spec.writes}
    asked = [(name, one) for name, some in questions.items() for one in some
             if right is None or one.id in right[name]]  # fmt: skip
    scorer.tick.total += ANSWER * len(asked)
    # All of the archive's requests at once: what they share runs once.
    requests = [(name, *one) for name in loaded for i in loaded[name] for one in i.requests]
    answers = iter(scorer.loglikelihood(requests))
    keys = [(name, one.id) for name, one in asked]
    written = dict(zip(keys, ask(scorer, asked), strict=True))
    tasks = []
    for name, spec in suite.tasks.items():
        found: dict[str, Any] = {"chance": 0.0}
        if spec.writes:
            found["items"] = tuple(one.id for one in questions[name])
            rows = [written.get((name, one), (0.0, "", 0)) for one in found["items"]]
            found["values"], found["answers"], found["ended"] = zip(*rows, strict=True)
        else:
            likely = [list(islice(answers, len(item.requests))) for item in loaded[name]]
            found = _likely(spec, loaded[name], likely)
            found |= _ignorant(scorer, name, spec, loaded[name]) if floors else {}
        tasks.append(TaskScores(name, suite.dimension_of(name), spec.metric, spec.primary, **found))
    return CapabilityScores(
        model.name, model.fingerprint, dtype_name(model.model.dtype), describe(suite), tuple(tasks),
        truncated=dict(scorer.truncated), seconds=round(time.perf_counter() - start, 2),
        versions=deciding_versions(),
    )  # fmt: skip


def suite_items(suite: Suite) -> Iterator[tuple[str, str, str]]:
    """Yield task, id and text of every item a suite scores, without worked examples."""
    for name, spec in suite.tasks.items():
        for one in asked_texts(spec) if spec.writes else item_texts(spec):
            yield (name, *one)


def _likely(
    spec: TaskSpec, items: Sequence[Item], rows: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Return the record of a task scored by likelihood, as fields of `TaskScores`."""
    chance = spec.chance or 0.0
    if chance == "choices":
        chance = sum(1 / len(item.requests) for item in items) / len(items)
    return {
        "chance": float(chance),
        "items": tuple(item.id for item in items),
        "values": tuple(accuracies(spec, items, rows)),
        "gold": tuple(item.gold for item in items),
        "loglikelihoods": rounded(rows),
        "bytes": tuple(tuple(len(answer.encode()) for _, answer in i.requests) for i in items),
        "floor": {"passage": "none", "contexts": "uniform"}.get(str(spec.form), "context-free"),
    }


def _ignorant(scorer: Scorer, name: str, spec: TaskSpec, items: Sequence[Item]) -> dict[str, Any]:
    """Return what a task's items score without the knowledge, as fields of `TaskScores`: after a
    cue alone, as OLMES has it, and by the frequencies of single tokens in all that the archive has
    of the task, scored or not."""
    floors = []
    if spec.form not in ("passage", "contexts"):
        distinct = list(dict.fromkeys(choice for item in items for choice in item.choices))
        found = scorer.loglikelihood([(name, CUE, answer) for answer in distinct])
        known = dict(zip(distinct, found, strict=True))
        floors = [[known[choice] for choice in item.choices] for item in items]
    right = [item.right[1] for item in items]
    seen = scorer.encode(list(dict.fromkeys(task_texts(spec))), special=False)
    counts = Counter(token for row in seen for token in row)
    total = math.log(counts.total())
    cost = {token: math.log(count) - total for token, count in counts.items()}
    costs = [math.fsum(cost[token] for token in row) for row in scorer.encode(right, special=False)]
    return {"floors": rounded(floors), "unigram": rounded([costs])[0]}
