"""Evaluate a model on a suite, and keep what it did with each item.

Scores of a dense model are kept in the cache, because every comparison needs them again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmix.errors import CalmixError, InputError
from calmix.evaluation.records import Floor, Outcome, TaskScores, rounded
from calmix.evaluation.scores import CapabilityScores, describe, load_scores
from calmix.evaluation.suites import Suite, TaskSpec, load_suite
from calmix.evaluation.tasks import Item, check, item_texts, load_items, task_texts
from calmix.files import cache_dir, sha256_json
from calmix.models import OpenModel, open_model
from calmix.models.opening import end_tokens, in_chat
from calmix.precision import dtype_name

if TYPE_CHECKING:
    from calmix.evaluation.scorer import Scorer

CUE = "Answer:"  # what stands in place of a question
SCORER = 2  # raised when the scorer gives other numbers, so that cached scores are not reused
FLOORS = 2  # the same of the scores without the question, which a dense model's alone hold


def choose(
    suite: Suite | str | Path,
    *,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    quick: bool = False,
    limit: int | None = None,
) -> Suite:
    """Return the suite as it is to be run."""
    chosen = suite if isinstance(suite, Suite) else load_suite(suite)
    chosen = chosen.only(dimensions=dimensions, tasks=tasks)
    chosen = chosen.quick() if quick else chosen
    return chosen if limit is None else chosen.limited(limit)


def runnable(suite: Suite, allowed: bool) -> tuple[Suite, list[str]]:
    """Return what of a suite is run, and the tasks left out: those that ask for programs, unless
    these may be run."""
    left = [name for name, one in suite.tasks.items() if one.runs_code]
    rest = [name for name in suite.tasks if name not in left]
    return (suite, []) if allowed or not left or not rest else (suite.only(tasks=rest), left)


def check_code(suite: Suite, allowed: bool) -> None:
    """Refuse a suite that runs code the model wrote, with an `InputError`, unless allowed."""
    running = [name for name, task in suite.tasks.items() if task.runs_code]
    if running and not allowed:
        raise InputError(
            f"task {', '.join(running)} runs code the model writes: pass --allow-code-execution "
            "(allow_code_execution=True) to run it in a limited subprocess, or leave it out "
            "with --task"
        )


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
    cache: bool = False,
    progress: Callable[[int, int], None] | None = None,
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
        cache: take the scores from the cache if this model's files were scored before, and
            keep them there otherwise. Leave it off for a model changed in memory: its files
            do not say so.
        progress: called with the number of requests done and in all.

    Raises:
        InputError: unknown suite, dimension or task, an empty limit, code execution not allowed.
        ModelError: the model cannot be opened, or its tokenizer lacks what a task needs.
    """
    from calmix.evaluation.scorer import BATCH_TOKENS

    chosen = choose(suite, dimensions=dimensions, tasks=tasks, quick=quick, limit=limit)
    chosen, left = runnable(chosen, allow_code_execution)
    check_code(chosen, allow_code_execution)
    if isinstance(model, (str, Path)):
        model = open_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    size = BATCH_TOKENS if batch_tokens is None else batch_tokens
    if cache and floors:
        kept = _cache_file(model, chosen, size)
        try:
            scores = load_scores(kept)
        except InputError:  # none there, or damaged
            scores = _run(model, chosen, size, floors, progress)
            scores.save(kept)
    else:
        scores = _run(model, chosen, size, floors, progress)
    return replace(scores, not_run=tuple(left), form=_form(model, chosen))


def _cache_file(model: OpenModel, suite: Suite, batch_tokens: int) -> Path:
    # Rounding differs with the device, its threads and the batch size: with all of them in the
    # key a model compared with its own cached scores has kept exactly all.
    import torch

    key = sha256_json(
        [
            model.fingerprint, model.tokenizer_fingerprint, form_of(model, suite), suite.hash,
            dtype_name(model.model.dtype),
            [model.model.device.type, torch.get_num_threads(), batch_tokens], SCORER, FLOORS,
            _versions(),
        ]
    )  # fmt: skip
    return cache_dir() / "scores" / f"{key}.json"


def form_of(model: OpenModel, suite: Suite) -> list[Any]:
    """Return what decides, beside weights and tokenizer, how a model is asked and when it ends."""
    if not suite.asks:
        return []
    return [str(getattr(model.tokenizer, "chat_template", None)), end_tokens(model)]


def _form(model: OpenModel, suite: Suite) -> str:
    if not suite.asks:
        return ""
    return "worked examples" if in_chat(model.tokenizer, "Hello") is None else "chat template"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("calmix", "lm_eval", "torch", "transformers")}


def _run(
    model: OpenModel,
    suite: Suite,
    batch_tokens: int,
    floors: bool,
    progress: Callable[[int, int], None] | None,
) -> CapabilityScores:
    from calmix.evaluation.scorer import Request, Scorer

    start = time.perf_counter()
    loaded = {name: _load(name, spec) for name, spec in suite.tasks.items() if not spec.writes}
    scorer = Scorer(model, batch_tokens=batch_tokens, progress=progress)
    # All of the archive's requests at once: what they share runs once.
    asked = [Request(name, *one) for name in loaded for i in loaded[name] for one in i.requests]
    answers = (value for value, _ in scorer.loglikelihood(asked))
    tasks = []
    for name, spec in suite.tasks.items():
        if spec.writes:
            from calmix.evaluation.abilities import ask

            outcomes = ask(scorer, spec)
        else:
            rows = [list(islice(answers, len(item.requests))) for item in loaded[name]]
            outcomes = check(spec, loaded[name], rows)
        tasks.append(_task_scores(suite, name, outcomes, scorer, floors))
    return CapabilityScores(
        model.name, model.fingerprint, dtype_name(model.model.dtype), describe(suite), tuple(tasks),
        truncated=dict(scorer.truncated), seconds=round(time.perf_counter() - start, 2),
        versions=_versions(),
    )  # fmt: skip


def _load(name: str, spec: TaskSpec) -> list[Item]:
    """Return a task's items in the archive."""
    try:
        return load_items(spec)
    except CalmixError as error:
        raise type(error)(f"task {name}: {error}") from error


def suite_items(suite: Suite) -> Iterator[tuple[str, str, str]]:
    """Yield task, id and text of every item a suite scores, without worked examples."""
    for name, spec in suite.tasks.items():
        if spec.writes:
            from calmix.evaluation.abilities import asked_texts

            yield from ((name, *one) for one in asked_texts(spec))
        else:
            yield from ((name, *one) for one in item_texts(spec))


def _task_scores(
    suite: Suite, name: str, outcomes: Sequence[Outcome], scorer: Scorer, floors: bool
) -> TaskScores:
    """Return the record of a task, with what its items score without the knowledge if wanted."""
    spec = suite.tasks[name]
    chance = 0.0 if spec.chance in (None, "choices") else float(spec.chance)
    if spec.chance == "choices":
        chance = sum(1 / len(one.requests) for one in outcomes) / len(outcomes)
    scores = TaskScores(
        name, suite.dimension_of(name), spec.metric, spec.primary, chance,
        tuple(one.id for one in outcomes),
        tuple(one.value for one in outcomes if one.value is not None),
    )  # fmt: skip
    if spec.writes:
        return replace(
            scores,
            answers=tuple(one.answer or "" for one in outcomes),
            ended=tuple(int(one.ended) for one in outcomes),
        )
    answers = [[answer for _, answer in one.requests] for one in outcomes]
    floor: Floor = "none" if spec.form == "passage" else "context-free"
    if any(len({context for context, _ in one.requests}) > 1 for one in outcomes):
        floor = "uniform"
    known: dict[str, float] = {}
    unigram: list[float] = []
    if floors:
        if floor == "context-free":
            known = _without_question(scorer, name, answers)
        right = [row[one.gold] for row, one in zip(answers, outcomes, strict=True)]
        unigram = _single_tokens(scorer.tokenizer, task_texts(spec), right)
    return replace(
        scores,
        gold=tuple(one.gold for one in outcomes),
        loglikelihoods=rounded([one.loglikelihoods for one in outcomes]),
        bytes=tuple(tuple(len(answer.encode()) for answer in row) for row in answers),
        floor=floor,
        floors=rounded([[known[answer] for answer in row] for row in answers if known]),
        unigram=rounded([unigram])[0],
    )


def _without_question(scorer: Scorer, task: str, answers: list[list[str]]) -> dict[str, float]:
    """Return the log-likelihood of every answer after a cue alone, as OLMES takes it."""
    from calmix.evaluation.scorer import Request

    distinct = list(dict.fromkeys(answer for row in answers for answer in row))
    found = scorer.loglikelihood([Request(task, CUE, answer) for answer in distinct])
    return {answer: value for answer, (value, _) in zip(distinct, found, strict=True)}


def _single_tokens(tokenizer: Any, texts: Sequence[str], answers: list[str]) -> list[float]:
    """Return the log-likelihood of every answer under the frequencies of single tokens in texts
    and answers: all that the archive has of the task, scored or not."""

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    counts = Counter(token for row in ids(list(dict.fromkeys([*texts, *answers]))) for token in row)
    total = math.log(counts.total())
    cost = {token: math.log(count) - total for token, count in counts.items()}
    return [math.fsum(cost[token] for token in encoded) for encoded in ids(answers)]
