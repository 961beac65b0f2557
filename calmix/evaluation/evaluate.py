"""Evaluate a model on a suite: build the tasks, score them through the harness, keep each item.

Scores of a dense model are kept in the cache, because every comparison needs them again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from calmix.errors import InputError
from calmix.evaluation.records import Floor, TaskScores, rounded
from calmix.evaluation.scores import CapabilityScores, describe, load_scores
from calmix.evaluation.suites import WRITTEN, Suite, load_suite
from calmix.files import cache_dir, sha256_json
from calmix.models import OpenModel, open_model

if TYPE_CHECKING:
    from calmix.evaluation.scorer import Scorer
    from calmix.evaluation.tasks import BuiltTask

BATCH_TOKENS = 2048
CUE = "Answer:"  # what stands in place of a question
SCORER = 2  # raised when the scorer gives other numbers, so that cached scores are not reused


def choose(
    suite: Suite | str | Path,
    *,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    quick: bool = False,
    limit: int | None = None,
) -> Suite:
    """Return the suite as it is to be run.

    Raises:
        InputError: unknown suite, dimension or task, or a limit that is not positive.
    """
    chosen = suite if isinstance(suite, Suite) else load_suite(suite)
    chosen = chosen.only(dimensions=dimensions, tasks=tasks)
    if quick:
        chosen = chosen.quick()
    return chosen if limit is None else chosen.limited(limit)


def check_code(suite: Suite, allowed: bool) -> None:
    """Refuse a suite that runs code the model wrote, unless that is allowed.

    Raises:
        InputError: naming the tasks and the option.
    """
    running = [name for name, task in suite.tasks.items() if task.runs_code]
    if running and not allowed:
        raise InputError(
            f"task {', '.join(running)} runs code the model writes: pass --allow-code-execution "
            "(allow_code_execution=True) to run it in a limited subprocess, or leave it out "
            "with --task"
        )


def evaluate(
    model: OpenModel | str,
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
        quick: score the suite's quick slice.
        limit: score at most so many items a task.
        dtype, device, trust_remote_code: how to open the model, if it is given by name.
        batch_tokens: tokens in one forward pass; decides speed and memory, not scores.
        allow_code_execution: run code the model writes, in a limited subprocess.
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
    chosen = choose(suite, dimensions=dimensions, tasks=tasks, quick=quick, limit=limit)
    check_code(chosen, allow_code_execution)
    if isinstance(model, str):
        model = open_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    size = BATCH_TOKENS if batch_tokens is None else batch_tokens
    kept = _cache_file(model, chosen, size) if cache and floors else None
    if kept is not None and kept.is_file():
        try:
            return load_scores(kept)
        except InputError:  # of an older format, or damaged: scored again and replaced
            pass
    scores = _run(model, chosen, size, allow_code_execution, floors, progress)
    if kept is not None:
        scores.save(kept)
    return scores


def _dtype(model: OpenModel) -> str:
    return str(model.model.dtype).removeprefix("torch.")


def _cache_file(model: OpenModel, suite: Suite, batch_tokens: int) -> Path:
    # Rounding differs with the device, its threads and the batch size: with all of them in the
    # key a model compared with its own cached scores has kept exactly all.
    import torch

    device = next(model.model.parameters()).device
    key = sha256_json(
        [
            model.fingerprint,
            model.tokenizer_fingerprint,
            suite.name,
            suite.hash,
            _dtype(model),
            [device.type, torch.get_num_threads(), batch_tokens],
            SCORER,
            _versions(),
        ]
    )
    return cache_dir() / "scores" / f"{key}.json"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("calmix", "lm_eval", "torch", "transformers")}


def _run(
    model: OpenModel,
    suite: Suite,
    batch_tokens: int,
    allow_code: bool,
    floors: bool,
    progress: Callable[[int, int], None] | None,
) -> CapabilityScores:
    from lm_eval.evaluator import evaluate as harness_evaluate

    from calmix.evaluation.scorer import Scorer
    from calmix.evaluation.tasks import build_tasks, quiet_harness

    start = time.perf_counter()
    built = build_tasks(suite)
    scorer = Scorer(model, batch_tokens=batch_tokens, progress=progress)
    # The harness keys tasks by their own names, which two tasks of a suite may share.
    tasks = {_key(b.name, part): task for b in built for part, task in b.parts.items()}
    samples = {
        _key(b.name, part): numbers
        for b in built
        for part, numbers in b.samples.items()
        if numbers is not None
    }
    for name, task in tasks.items():
        task.set_config("task", name)
    with quiet_harness():
        results = harness_evaluate(
            scorer,
            tasks,
            samples=samples or None,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=allow_code,
        )
    assert results is not None
    found = []
    for task in built:
        rows = {part: results["samples"][_key(task.name, part)] for part in task.parts}
        found.append(_task_scores(task, _chosen_rows(task, rows), scorer if floors else None))
    truncated: dict[str, int] = {}
    for name, count in scorer.truncated.items():
        truncated[name.split("/")[0]] = truncated.get(name.split("/")[0], 0) + count
    return CapabilityScores(
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=_dtype(model),
        suite=describe(suite),
        tasks=tuple(found),
        truncated=truncated,
        seconds=round(time.perf_counter() - start, 2),
        versions=_versions(),
    )


def _key(name: str, part: str) -> str:
    return name if part == name else f"{name}/{part}"


def _chosen_rows(
    built: BuiltTask, samples: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Return the harness's samples of a task's items under the filter that counts, by item."""
    found = {}
    for part, rows in samples.items():
        filters = list(dict.fromkeys(row["filter"] for row in rows))
        wanted = built.spec.filter or filters[0]
        if wanted not in filters:
            raise InputError(
                f"task {built.name}: there is no filter '{wanted}' (has: {', '.join(filters)})"
            )
        ids = built.ids[part]
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            if row["filter"] == wanted:
                number = row["doc_id"]
                found[ids[number] if ids else f"{part}/{number}"] = row | {"part": part}
    return found


def _task_scores(
    built: BuiltTask, rows: dict[str, dict[str, Any]], scorer: Scorer | None
) -> TaskScores:
    """Return the record of a task; with a scorer, what its items score without the knowledge."""
    spec = built.spec
    chances = [1 / len(row["arguments"]) for row in rows.values()]
    chance = sum(chances) / len(chances) if spec.chance == "choices" else spec.chance or 0.0
    values: tuple[float, ...] = ()
    if spec.metric != "bits_per_byte":
        values = tuple(float(_metric(built.name, spec.metric, row)) for row in rows.values())
    head = built.name, built.dimension, spec.metric
    if spec.metric in WRITTEN:
        return TaskScores(*head, spec.primary, chance, tuple(rows), values)
    asked = [_requests(row) for row in rows.values()]
    answers = [[answer for _, answer in pairs] for pairs in asked]
    gold = [_gold(built.parts[row["part"]], row) for row in rows.values()]
    floor: Floor = "context-free"
    if spec.metric == "bits_per_byte":
        floor = "none"
    elif any(len({context for context, _ in pairs}) > 1 for pairs in asked):
        floor = "uniform"
    floors: list[list[float]] = []
    unigram: list[float] = []
    if scorer is not None:
        if floor == "context-free":
            floors = _without_question(scorer, built.name, answers)
        right = [row[at] for row, at in zip(answers, gold, strict=True)]
        unigram = _single_tokens(scorer.tokenizer, built, [pairs[0][0] for pairs in asked], right)
    return TaskScores(
        *head,
        spec.primary,
        chance,
        tuple(rows),
        values,
        gold=tuple(gold),
        loglikelihoods=rounded(
            [[answer[0] for answer in row["filtered_resps"]][: len(pairs)]
             for row, pairs in zip(rows.values(), asked, strict=True)]
        ),
        bytes=tuple(tuple(len(answer.encode()) for answer in row) for row in answers),
        floor=floor,
        floors=rounded(floors),
        unigram=rounded([unigram])[0],
    )  # fmt: skip


def _requests(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return context and continuation of every choice, without the harness's own context-free
    requests, which follow them where a task has the metric `acc_mutual_info`."""
    pairs = [(context, answer) for context, answer in row["arguments"]]
    half = len(pairs) // 2
    doubled = half > 0 and [a for _, a in pairs[:half]] == [a for _, a in pairs[half:]]
    return pairs[:half] if doubled and all(not c for c, _ in pairs[half:]) else pairs


def _gold(task: Any, row: dict[str, Any]) -> int:
    """Return the index of the right choice; where contexts are the choices, the harness's task
    has it in place of its text."""
    contexts = getattr(task, "multiple_input", None)
    target = task.doc_to_text(row["doc"]) if contexts else row["target"]
    target = target[0] if isinstance(target, list) else target
    if isinstance(target, int):
        return target
    answers = [answer.strip() for _, answer in row["arguments"]]
    if (text := str(target).strip()) not in answers:
        raise InputError(
            f"an item of task {row['part']} has its right answer in no choice: {text!r}"
        )
    return answers.index(text)


def _without_question(scorer: Scorer, task: str, answers: list[list[str]]) -> list[list[float]]:
    """Return the log-likelihood of every answer after a cue alone, as OLMES takes it."""
    distinct = list(dict.fromkeys(answer for row in answers for answer in row))
    asked = [SimpleNamespace(args=(CUE, answer), task_name=task) for answer in distinct]
    known = dict(zip(distinct, (value for value, _ in scorer.loglikelihood(asked)), strict=True))
    return [[known[answer] for answer in row] for row in answers]


def _single_tokens(
    tokenizer: Any, built: BuiltTask, questions: list[str], answers: list[str]
) -> list[float]:
    """Return the log-likelihood of every answer under the frequencies of single tokens in all
    questions and answers that the archive has of the task, scored or not; of a task of the
    harness's own, in those that are scored."""
    from calmix.evaluation.tasks import task_texts

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    texts = questions if built.spec.archive is None else task_texts(built.spec)
    counts = Counter(token for row in ids(list(dict.fromkeys([*texts, *answers]))) for token in row)
    total = math.log(counts.total())
    cost = {token: math.log(count) - total for token, count in counts.items()}
    return [math.fsum(cost[token] for token in encoded) for encoded in ids(answers)]


def _metric(task: str, metric: str, row: dict[str, Any]) -> Any:
    # The harness's tasks spell it in two ways.
    names = ["pass@1", "pass_at_1"] if metric == "pass@1" else [metric]
    for name in names:
        if name in row:
            return row[name]
    raise InputError(f"task {task} has no metric '{metric}' (has: {', '.join(row['metrics'])})")
