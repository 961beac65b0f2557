"""Tasks of lm-evaluation-harness's own registry: its data, prompts, filters and metrics."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task as harness_task
import lm_eval.tasks
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from calmix.errors import InputError, nearest
from calmix.evaluation.generations import generate
from calmix.evaluation.records import Outcome
from calmix.evaluation.sandbox import code_eval_in_sandbox
from calmix.evaluation.scorer import Request, Scorer
from calmix.evaluation.suites import WRITTEN, TaskSpec
from calmix.evaluation.tasks import Item


@dataclass(frozen=True)
class Part:
    """One of the harness's tasks that a suite's task consists of (MMLU has 57), with number and
    identifier of each document that is scored."""

    name: str
    task: Any
    ids: dict[int, str]

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield identifier and text of every document that is scored."""
        for number, identifier in self.ids.items():
            task, doc = self.task, self.task.eval_docs[number]
            choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
            texts = [task.doc_to_text(doc), task.doc_to_target(doc), *choices]
            yield identifier, "\n".join(text for text in texts if isinstance(text, str))


def load_parts(spec: TaskSpec, items: Sequence[Item] | None) -> list[Part]:
    """Return what a task consists of, over the archive's items if any are given."""
    assert spec.harness is not None
    manager = registry_of(spec.harness)
    sandbox = code_eval_in_sandbox() if spec.runs_code else contextlib.nullcontext()
    with quiet_harness(), sandbox:
        try:
            if items is None:
                tasks = manager.load([spec.harness])["tasks"]
            else:  # `load` has no way to change a registered task: it would replace it
                data = datasets.Dataset.from_list([dict(item.doc) for item in items])
                index = manager.task_index
                changed = {"custom_dataset": lambda **_: {"test": data}}
                made = manager._factory.build(
                    index[spec.harness], overrides=changed, registry=index
                )
                tasks = {spec.harness: made}
        except ImportError as error:
            raise InputError(
                f"lm-evaluation-harness needs more packages for {spec.harness}: {error}"
            ) from error
        except Exception as error:  # the hub's client raises anything when it is out of reach
            reason = next(iter(str(error).strip().splitlines()), repr(error))[:150]
            raise InputError(
                f"the data of {spec.harness} cannot be fetched from the hub ({reason})"
            ) from error
        if spec.shots is not None:
            for task in tasks.values():
                task.set_config("num_fewshot", spec.shots)
        # The documents of all parts share one limit.
        places = [(name, at) for name, task in tasks.items() for at in range(len(task.eval_docs))]
    if items is None:
        picked = spec.pick([at for _, at in places], [name for name, _ in places])
        ids = {places[at]: "{}/{}".format(*places[at]) for at in picked}
    else:
        ids = {place: item.id for place, item in zip(places, items, strict=True)}
    if not ids:
        raise InputError("no items are left to score")
    parts = [Part(name, task, {at: one for (part, at), one in ids.items() if part == name})
             for name, task in tasks.items()]  # fmt: skip
    return [part for part in parts if part.ids]


def score_parts(scorer: Scorer, name: str, spec: TaskSpec, parts: Sequence[Part]) -> list[Outcome]:
    """Let the harness ask a model a task's items and check what it answers."""
    with quiet_harness():
        results = harness_evaluate(
            _Model(scorer, name), {part.name: part.task for part in parts},
            samples={part.name: list(part.ids) for part in parts}, bootstrap_iters=0,
            log_samples=True, confirm_run_unsafe_code=spec.runs_code,
        )  # fmt: skip
    assert results is not None
    found = []
    for part in parts:
        rows = results["samples"][part.name]
        filters = list(dict.fromkeys(row["filter"] for row in rows))
        wanted = spec.filter or filters[0]
        if wanted not in filters:
            raise InputError(
                f"task {name}: there is no filter '{wanted}' (has: {', '.join(filters)})"
            )
        rows = [row for row in rows if row["filter"] == wanted]
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            found.append(_outcome(name, spec, part, row))
    return found


def _outcome(name: str, spec: TaskSpec, part: Part, row: dict[str, Any]) -> Outcome:
    # The harness's tasks spell one metric in two ways.
    names = ["pass@1", "pass_at_1"] if spec.metric == "pass@1" else [spec.metric]
    value = next((row[metric] for metric in names if metric in row), None)
    if value is None:
        known = ", ".join(row["metrics"])
        raise InputError(f"task {name} has no metric '{spec.metric}' (has: {known})")
    identifier, pairs = part.ids[row["doc_id"]], list(row["arguments"])
    if spec.metric in WRITTEN:
        return Outcome(identifier, pairs, value=float(value))
    first, rest = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    if rest == [("", answer) for _, answer in first]:  # of the metric `acc_mutual_info`
        pairs = first
    values = [answer[0] for answer in row["filtered_resps"]][: len(pairs)]
    return Outcome(identifier, pairs, gold_of(part.task, row), values, float(value))


def gold_of(task: Any, row: dict[str, Any]) -> int:
    """Return the index of the right choice; where contexts are the choices, the harness's task
    has it in place of its text."""
    contexts = getattr(task, "multiple_input", None)
    target = task.doc_to_text(row["doc"]) if contexts else row["target"]
    target = target[0] if isinstance(target, list) else target
    if isinstance(target, int):
        return target
    answers = [answer.strip() for _, answer in row["arguments"]]
    if (text := str(target).strip()) not in answers:
        raise InputError(f"an item of the harness has its right answer in no choice: {text!r}")
    return answers.index(text)


class _Model(LM):
    """A scorer as the harness sees it."""

    def __init__(self, scorer: Scorer, task: str) -> None:
        super().__init__()
        self.scorer, self.task = scorer, task

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self.scorer.loglikelihood([Request(self.task, *one.args) for one in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise InputError(f"task {self.task} asks for the likelihood of whole texts: leave it out")

    def generate_until(self, requests: list[Any]) -> list[str]:
        texts: list[str] = []
        for _, alike in groupby(requests, lambda request: repr(sorted(request.args[1].items()))):
            contexts, options = zip(*(request.args for request in alike), strict=True)
            how: dict[str, Any] = dict(normalize_gen_kwargs(dict(options[0])))
            if how["do_sample"]:
                raise InputError(f"task {self.task} samples its answers: leave it out")
            stops, room = how["until"], how["max_gen_toks"]
            texts += generate(self.scorer, contexts, task=self.task, stops=stops, room=room)
        return texts


@functools.cache
def registry(folder: Path | None = None) -> Any:
    """Return lm-evaluation-harness's own registry of tasks, of one folder or of all."""
    with quiet_harness():
        return TaskManager(include_path=folder, include_defaults=folder is None)


def registry_of(task: str) -> Any:
    """Return a registry with a task: of all, thousands of files, only if none is of its name."""
    files = Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
    for file in sorted(file for file in files if file.stem == task):
        if task in registry(file.parent).all_subtasks:
            return registry(file.parent)
    found = registry()
    if task not in found.all_tasks:
        raise InputError(
            f"lm-evaluation-harness has no task '{task}': {nearest(task, found.all_tasks)}"
        )
    return found


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep lm-evaluation-harness's advice and progress bars off the user's error stream."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    levels = [logger.level for logger in loggers]
    bar = harness_task.tqdm
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    harness_task.tqdm = lambda iterable, *_, **__: iterable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        harness_task.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
