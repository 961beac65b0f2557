"""Evaluate a model on a suite and record its result on every item.

Scores of a dense model are cached, since every comparison needs them.
"""

from __future__ import annotations

import ast
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.errors import DiskError, InputError, ModelError
from calmix.evaluation import checks
from calmix.evaluation.greedy import Prompt, answers, prompt
from calmix.evaluation.journal import Journal
from calmix.evaluation.likelihood import Progress
from calmix.evaluation.measures import TaskScores, rounded
from calmix.evaluation.prompts import THOUGHT, Ask, body, properties, same_call
from calmix.evaluation.sandbox import check_sandbox, failure
from calmix.evaluation.scorer import Scorer
from calmix.evaluation.scores import CapabilityScores, describe, load_scores
from calmix.evaluation.served import Served
from calmix.evaluation.suites import Suite, TaskSpec, choose, runnable
from calmix.evaluation.tasks import Item, load_items, task_texts
from calmix.machine import cores
from calmix.manifest import deciding_versions
from calmix.models.chat import end_tokens, in_chat, rendered
from calmix.models.opening import OpenModel, open_model
from calmix.precision import dtype_name
from calmix.progress import half_progress

ANSWER = 24  # cost of a generated answer, in likelihood requests
JUDGES: dict[str, Callable[[str, Any], bool]] = {
    "own": checks.own_match,
    "exact": checks.same_text,
    "number": checks.same_number,
    "result": checks.same_result,
    "request": checks.as_requested,
    "tool": same_call,
}
CHUNK = 128  # a user's prompts that are answered together, and that a kill may lose
DISTANCE_TOKENS = 128  # tokens of an answer on which the distance is measured
THINKING = 1024  # tokens of an answer in which a model may think first
CUE = "Answer:"  # replaces the question when answers are scored without it
SCORER = 2  # raised when scores change, so that cached ones are not reused
BASELINES = 2  # the same for the baselines, which only a dense model's scores hold


def evaluate(
    model: OpenModel | Served | str | Path,
    suite: Suite | str | Path = "offline",
    *,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    quick: bool = False,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_code_execution: bool = False,
    baselines: bool = True,
    repeat: bool = False,
    cache: bool = False,
    dense: CapabilityScores | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> CapabilityScores:
    """Score a model on a suite.

    Args:
        model: the name of a model, or an open model, or one behind a server.
        suite: a suite, the name of a builtin one, or the path of a YAML file.
        dimensions, tasks: score only these; all if none are named.
        quick, limit: score the suite's quick slice; at most this many items per task.
        dtype, device, trust_remote_code: how to open a model given by name.
        allow_code_execution: run code the model writes, in a limited subprocess. Without it,
            tasks that ask for programs are left out.
        baselines: also compute the baselines without task knowledge (`TaskScores.baselines`), which
            retention needs from the dense model only.
        repeat: also generate the answers again, in another order and size of batches
            (`CapabilityScores.repeat`). Against the first ones they show what rounding alone
            changes: the ceiling of a comparison with this model.
        cache: read scores of the same model files from the cache, or store them there. Leave it
            off for a model changed in memory, which the cache cannot detect.
        dense: scores of the dense model, whose answers to a user's prompts set what is expected.
        journal: answers of an interrupted run, to which new ones are added.
        progress: called with the requests done and in total; an answer counts as several.

    Raises:
        InputError: unknown suite, dimension or task, an empty limit, code execution not allowed.
        ModelError: the model cannot be opened, or an answer exceeds its context.
    """
    chosen = choose(suite, dimensions=dimensions, tasks=tasks, quick=quick, limit=limit)
    chosen, skipped = runnable(chosen, allow_code_execution)
    if isinstance(model, (str, Path)):
        model = open_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    how: dict[str, Any] = {"cache": cache, "skipped": skipped, "journal": journal or Journal(None)}
    repeat = repeat and chosen.asks
    first, second = progress, progress
    if repeat and progress is not None:
        first, second = half_progress(progress, 0), half_progress(progress, 1)
    scores = _scored(model, chosen, baselines=baselines, dense=dense, progress=first, **how)
    if repeat:
        written = choose(chosen, tasks=[name for name, one in chosen.tasks.items() if one.writes])
        again = _scored(
            model,
            written,
            rearranged=True,
            dense=dense or scores,
            progress=second,
            **how,
        )
        scores = replace(scores, repeat=again.tasks)
    return scores


def _scored(
    model: OpenModel | Served,
    chosen: Suite,
    *,
    cache: bool,
    skipped: Sequence[str],
    journal: Journal,
    progress: Progress | None,
    baselines: bool = True,
    rearranged: bool = False,
    dense: CapabilityScores | None = None,
) -> CapabilityScores:
    """Score an open model on a suite that may run, or read its scores from the cache."""
    if isinstance(model, Served):
        form = "chat template" if model.chat else "worked examples"
    else:
        form = how_asked(model.tokenizer, chosen)
    cached = None
    if cache and baselines and isinstance(model, OpenModel):
        # Items of a user's rows are named after their file.
        stems = sorted((name, Path(t.file).stem) for name, t in chosen.tasks.items() if t.file)
        about = *form_of(model, chosen), chosen.hash, SCORER, BASELINES, *stems
        about += ("rearranged",) * rearranged
        cached = model.cached("scores", *about).with_suffix(".json")
        with suppress(InputError):  # missing or damaged
            return replace(
                load_scores(cached),
                model=model.name,
                suite=describe(chosen),
                not_run=tuple(skipped),
                form=form,
            )
    sha256 = model.fingerprint  # first: the files may change while the model is scored
    start, specs, done = time.perf_counter(), chosen.tasks, list[TaskScores]()
    items = suite_asks(chosen)
    with_tools = isinstance(model, Served) or takes_tools(model.tokenizer)
    with_switch = isinstance(model, Served) or can_think(model.tokenizer)
    questions = [
        (name, item if with_switch else replace(item, thinking=False))
        for name, of_task in items.items()
        if specs[name].writes
        and (with_tools or not any(one.tools and not one.own for one in of_task))
        for item in of_task
    ]
    asked = {name for name, _ in questions}
    if any(one.check == "program" for _, one in questions):
        check_sandbox()
    requests = [
        (name, *one)
        for name, of_task in items.items()
        if not specs[name].writes
        for item in of_task
        for one in item.requests
    ]
    scorer, likely = None, iter(list[float]())
    if isinstance(model, Served):
        if requests:
            raise InputError(
                f"{model.name}: a server gives no likelihoods, which task {requests[0][0]} needs: "
                "use --prompts, or select tasks with generated answers by --task"
            )
        texts = model.answers(
            [one for _, one in questions], rearranged=rearranged, journal=journal, progress=progress
        )
    else:
        scorer = Scorer(model, progress=progress)
        scorer.total += ANSWER * len(questions)
        # All likelihood requests at once, so that common prefixes run only once.
        likely = iter(scorer.loglikelihood(requests))
        texts = ask(scorer, questions, rearranged, journal)
    judged = iter(_judged(questions, texts, dense))
    for name, spec in specs.items():
        of_task, record = items[name], dict[str, Any](chance=0.0)
        if not spec.writes:
            rows = [[*islice(likely, len(item.requests))] for item in of_task]
            record = _likely(name, spec, of_task, rows, scorer if baselines else None)
        elif name in asked:
            columns = [*zip(*islice(judged, len(of_task)), strict=True)]
            record |= zip(("values", "answers", "ended"), columns, strict=False)
            if spec.kind == "prompts":
                record["prompts"] = tuple(item.plain for item in of_task)
                record["properties"] = columns[-1]
        done.append(
            TaskScores(
                name,
                chosen.dimension_of(name),
                spec.metric,
                spec.primary,
                items=tuple(item.id for item in of_task),
                **record,
            )
        )
    if isinstance(model, OpenModel) and model.files is not None:
        model.files.check()
    scores = CapabilityScores(
        model.name,
        sha256,
        "served" if isinstance(model, Served) else dtype_name(model.model.dtype),
        describe(chosen),
        tuple(done),
        truncated={} if scorer is None else dict(scorer.truncated),
        seconds=round(time.perf_counter() - start, 2),
        versions=deciding_versions(),
        not_run=tuple(skipped),
        form=form,
    )
    if cached is not None:
        with suppress(DiskError):  # a cache that is full or read-only costs no result
            scores.save(cached)
    return scores


def how_asked(tokenizer: Any, suite: Suite) -> str:
    """Return the form of a suite's prompts (`CapabilityScores.form`); "" if no answer is asked."""
    if not suite.asks:
        return ""
    return "worked examples" if in_chat(tokenizer, "Hello") is None else "chat template"


def form_of(model: OpenModel, suite: Suite) -> list[Any]:
    """Return what else affects answers: the chat template and the end tokens."""
    if not suite.asks:
        return []
    return [str(getattr(model.tokenizer, "chat_template", None)), end_tokens(model)]


def own_answers(
    opened: OpenModel, suite: Suite, scores: CapabilityScores
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return a user's prompts with a model's answers as `texts` and `last` of `distance.reference`,
    by item. Rows that exceed the model's context are left out, and so are empty answers."""
    texts, last, items = dict[str, Tensor](), dict[str, int](), suite_asks(suite)
    for task in scores.tasks:
        known = {one.id: one for one in items[task.name]}
        for item, answer in zip(task.items, task.answers, strict=True):
            before = as_prompt(opened, known[item]).ids
            ids = opened.tokenizer(answer, add_special_tokens=False)["input_ids"][:DISTANCE_TOKENS]
            if ids and before and len(before) + len(ids) <= (opened.context or math.inf):
                texts[item], last[item] = torch.tensor([[*before, *ids]]), len(ids)
    return texts, last


def accuracies(
    spec: TaskSpec, items: Sequence[Item], rows: Sequence[Sequence[float]]
) -> list[float]:
    """Return 1 for each item whose likeliest choice is right, else 0, as lm-evaluation-harness
    does, from the log-likelihoods `rows` of its choices; empty for bits per byte."""
    if spec.metric == "bits_per_byte":
        return []
    # `acc_norm` divides by characters, not counting the leading space if all choices have one.
    spaced = all(choice[:1] == " " for item in items for _, choice in item.requests)
    norms = [
        [len(choice) - spaced if spec.metric == "acc_norm" else 1 for _, choice in item.requests]
        for item in items
    ]
    return [
        float(np.argmax(np.divide(row, norm)) == item.gold)
        for item, row, norm in zip(items, rows, norms, strict=True)
    ]


def _likely(
    name: str,
    spec: TaskSpec,
    items: Sequence[Item],
    rows: Sequence[Sequence[float]],
    scorer: Scorer | None,
) -> dict[str, Any]:
    """Return the fields of `TaskScores` for a task scored by likelihood.

    With a scorer also the baselines without task knowledge: answers after the cue alone, as in
    OLMES, and a unigram code from the token frequencies of the task's whole data set.
    """
    chance = spec.chance or 0.0
    if chance == "choices":
        chance = sum(1 / len(item.requests) for item in items) / len(items)
    answers = [[answer for _, answer in item.requests] for item in items]
    scores: dict[str, Any] = {
        "chance": float(chance),
        "values": tuple(accuracies(spec, items, rows)),
        "gold": tuple(item.gold for item in items),
        "loglikelihoods": rounded(rows),
        "bytes": tuple(tuple(len(one.encode()) for one in row) for row in answers),
    }
    if scorer is None:
        return scores
    if spec.form not in ("passage", "contexts"):
        distinct = list(dict.fromkeys(one for row in answers for one in row))
        values = scorer.loglikelihood([(name, CUE, answer) for answer in distinct])
        context_free = dict(zip(distinct, values, strict=True))
        scores["baselines"] = rounded([[context_free[one] for one in row] for row in answers])
    texts = task_texts(spec)
    right = [row[item.gold] for row, item in zip(answers, items, strict=True)]
    encoded = scorer.tokenizer([*texts, *right], add_special_tokens=False, verbose=False)
    ids = encoded["input_ids"]
    counts = Counter(chain.from_iterable(ids[: len(texts)]))
    total = math.log(counts.total())
    unigram = {token: math.log(count) - total for token, count in counts.items()}
    codes = [math.fsum(unigram[token] for token in row) for row in ids[len(texts) :]]
    return scores | {"unigram": rounded([codes])[0]}


def ask(
    scorer: Scorer,
    questions: Sequence[tuple[str, Ask]],
    rearranged: bool,
    journal: Journal,
) -> list[tuple[str, bool]]:
    """Generate an answer to each item (given with its task's name). Returns its text and whether it
    ended. A user's prompts are answered in chunks, and not again if the `journal` has them."""
    prompts = [as_prompt(scorer.opened, one) for _, one in questions]
    context = scorer.opened.context or math.inf
    scorer.truncated.update(
        name for (name, _), one in zip(questions, prompts, strict=True) if one.needs > context
    )
    own = [at for at, (_, one) in enumerate(questions) if one.own]
    others = [at for at, (_, one) in enumerate(questions) if not one.own]
    texts_by_number = dict[int, tuple[str, bool]]()
    chunks = (own[at : at + CHUNK] for at in range(0, len(own), CHUNK))
    for part in filter(None, (others, *chunks)):
        key = ""
        if part is not others:
            about = [(prompts[at].ids, prompts[at].tokens) for at in part]
            key = scorer.opened.cached("answers", rearranged, about).name
        if (texts := journal.known.get(key)) is None:
            texts = answers(
                scorer.opened,
                [prompts[at] for at in part],
                rearranged=rearranged,
                progress=lambda done, total: scorer.tick(ANSWER),
            )
            if key:
                journal.add(key, texts)
        else:
            scorer.tick(ANSWER * len(part))
        texts_by_number |= zip(part, texts, strict=True)
    return [texts_by_number[at] for at in range(len(questions))]


def _judged(
    questions: Sequence[tuple[str, Ask]],
    texts: Sequence[tuple[str, bool]],
    dense: CapabilityScores | None,
) -> list[tuple[float, str, int, dict[str, bool]]]:
    """Return of each answer whether it counts, its text, whether it ended, and its properties. A
    user's prompt without a check counts if its answer has all of them."""
    known = {
        (task.name, item): text
        for task in (dense.tasks if dense is not None else ())
        for item, text in zip(task.items, task.answers, strict=False)
    }
    with ThreadPoolExecutor(cores()) as pool:  # programs run in subprocesses
        right = [*pool.map(lambda both, one: is_right(both[1], *one), questions, texts)]
    judgements = []
    for (name, one), (text, ended), good in zip(questions, texts, right, strict=True):
        seen = dict[str, bool]()
        if one.own:
            seen = properties(one, text, ended, known.get((name, one.id)))
            seen |= {"right": good} if one.check else {}
            good = good if one.check else all(seen.values())
        judgements.append((float(good), text, int(ended), seen))
    return judgements


def as_prompt(opened: OpenModel, one: Ask) -> Prompt:
    """Return an item as token ids; a ModelError if the chat template refuses a user's prompt."""
    tokenizer, how = opened.tokenizer, dict[str, Any]()
    if one.thinking:
        how["enable_thinking"] = True
    if one.tools:
        how["tools"] = [*one.tools]
    built = prompt(tokenizer, one.messages, one.plain, one.tokens, one.until, **how)
    if not one.own:
        return built
    begins = f"the prompt that begins '{one.plain[:40]}'"
    if opened.context is not None and len(built.ids) >= opened.context:
        raise ModelError(
            f"{begins} has {len(built.ids):,} tokens, and the context of {opened.name} holds "
            f"{opened.context:,}: shorten it or leave it out"
        )
    if not getattr(tokenizer, "chat_template", None):
        return built
    if rendered(tokenizer, one.messages or (), **how) is None:
        raise ModelError(f"the chat template of {opened.name} refuses {begins}: change its turns")
    if one.tools and not takes_tools(tokenizer):
        raise ModelError(
            f"the chat template of {opened.name} has no tools, which {begins} gives: leave such "
            "prompts out, or use a template with tools"
        )
    return built


def suite_asks(suite: Suite) -> dict[str, list[Any]]:
    """Return the items of a suite's tasks. If the model is to think, chats have `THINKING` more
    tokens, and tasks in other forms stay as they are."""
    by_task = {name: load_items(spec) for name, spec in suite.tasks.items()}
    if not suite.thinking:
        return by_task
    return {
        name: [
            replace(one, thinking=True, tokens=one.tokens + THINKING)
            if isinstance(one, Ask) and one.messages is not None
            else one
            for one in items
        ]
        for name, items in by_task.items()
    }


def can_think(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template has a switch for thinking."""
    chat = [{"role": "user", "content": "Hello"}]
    return rendered(tokenizer, chat, enable_thinking=True) != rendered(tokenizer, chat)


def takes_tools(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template shows the model the tools that it is given."""
    chat, function = [{"role": "user", "content": "Hello"}], {"name": "f", "description": "F."}
    tools = [{"type": "function", "function": function | {"parameters": {"type": "object"}}}]
    return rendered(tokenizer, chat) not in (None, rendered(tokenizer, chat, tools=tools))


def is_right(item: Ask, answer: str, ended: bool = True) -> bool:
    """Whether an answer is right. Of one that was cut, only its `checks.judgeable_part` counts; an
    empty one is wrong. Programs run in the sandbox."""
    if item.thinking and not ended and THOUGHT not in answer:
        return False
    answer = body(answer) if item.own or item.thinking else answer
    answer = answer if ended else checks.judgeable_part(answer, item.check)
    if not answer.strip() or not item.check:
        return False
    if item.check == "text":
        return checks.short_match(answer, item.right, item.question)
    if item.check in ("number", "result") and isinstance(item.right, list):
        return any(JUDGES[item.check](answer, one) for one in item.right)
    if item.check != "program":
        return JUDGES[item.check](answer, item.right)
    doc, entry = item.doc, item.doc.get("entry_point", "")
    names = [entry]
    if not entry:  # all that the solution defines
        kinds, tree = (ast.FunctionDef, ast.ClassDef), ast.parse(doc["code"])
        names = [node.name for node in tree.body if isinstance(node, kinds)]
    tests = doc.get("test_list") or [f"assert {one}" for one in doc.get("tests", ())]
    entry = entry or next((name for name in names if f"{name}(" in tests[0]), "")
    code = checks.program(answer, doc.get("prompt", ""), entry)
    if "test" in doc:
        text, head = f"{doc['test']}\ncheck({entry})\n", doc["prompt"]
    else:
        text, head = "\n".join([doc.get("test_setup_code", ""), *tests, ""]), ""
    return not failure(code, text, names=names, head=head)
