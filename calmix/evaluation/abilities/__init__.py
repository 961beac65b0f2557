"""What a model is asked to do and a program can check: items, prompts and verdicts.

The questions of the archive's benchmarks, and requests, sums and tiny programs made here. A model
with a chat template is asked in it, others by worked examples.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmix import assets
from calmix.evaluation import checks
from calmix.evaluation.greedy import Answer, Prompt, answers
from calmix.evaluation.own import asked_of, program_of
from calmix.evaluation.records import Outcome
from calmix.evaluation.sandbox import check_sandbox, failure
from calmix.evaluation.suites import ARCHIVE, TaskSpec, asked_tasks, read_own
from calmix.machine import cores
from calmix.models.opening import in_chat

if TYPE_CHECKING:
    from calmix.evaluation.scorer import Scorer

SUMS = 120


@dataclass(frozen=True)
class Ask:
    """One item: the turn of a chat, or the text, that asks it, and what is right."""

    id: str
    number: int
    chat: str | None
    plain: str
    right: Any
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A task's items: `check` names the verdict, `tokens` an answer may have, `until` ends one."""

    name: str
    check: str
    tokens: int
    until: tuple[str, ...]
    items: tuple[Ask, ...]

    def picked(self, spec: TaskSpec) -> list[Ask]:
        """Return the items that a task of a suite scores."""
        places = spec.pick([item.number for item in self.items], [""] * len(self.items))
        return [self.items[at] for at in places]


def ask(scorer: Scorer, spec: TaskSpec) -> list[Outcome]:
    """Return what a model answers to the items of a task, and whether that is right."""
    task = task_of(spec)
    items = task.picked(spec)
    if task.check == "program":
        check_sandbox()
    scorer.tick.total += len(items)
    tokenizer = scorer.tokenizer
    asked = prompts(task, items, tokenizer, chat=True)
    if cut := sum(len(one.ids) + one.tokens > scorer.max_length for one in asked):
        scorer.truncated[task.name] += cut
    found = answers(scorer.opened, asked, tick=scorer.tick)
    with ThreadPoolExecutor(cores()) as pool:  # programs run in processes of their own
        right = list(pool.map(functools.partial(verdict, task), items, found))
    return [
        Outcome(item.id, [], value=float(ok), answer=answer.text, ended=answer.ended)
        for item, answer, ok in zip(items, found, right, strict=True)
    ]


def asked_texts(spec: TaskSpec) -> list[tuple[str, str]]:
    """Return id and text of the items that a task scores: the question and what is right."""
    found = []
    for item in task_of(spec).picked(spec):
        doc = item.more
        right = doc.get("canonical_solution") or doc.get("code") or doc.get("solution")
        right = right or doc.get("answer") or item.right
        if spec.file is not None:
            right = doc["shown"] if "shown" in doc else "\n".join(doc["tests"])
        asked = doc.get("question") or doc.get("query") or item.chat or item.plain
        found.append((item.id, f"{str(asked).rpartition('Question:')[2]}\n{right}"))
    return found


def task_of(spec: TaskSpec) -> Asked:
    """Return a task with all its items."""
    if spec.file is not None:
        name = Path(spec.file).stem
        known, docs = asked_of(spec.file, str(spec.kind), spec.shots or 0)
        if spec.kind == "programs":  # asked as the small ones that come with the evaluation
            known = asked_tasks()["small_programs"] | known
        return _asked(name, known, docs)
    return load_asked(str(spec.asked))


@functools.lru_cache(maxsize=32)
def load_asked(name: str) -> Asked:
    """Return a task that comes with the evaluation."""
    known = asked_tasks()[name]
    return _asked(name, known, list(_MADE.get(known["from"], _archive)(known["from"])))


def _asked(name: str, known: Mapping[str, Any], docs: list[dict[str, Any]]) -> Asked:
    held = docs[len(docs) - known["examples"] :] if known.get("examples") else []
    docs = docs[: len(docs) - len(held)]

    def worked(doc: Mapping[str, Any]) -> str:
        if known["plain"] == "context":
            return str(doc["context"])
        return str(known["plain"].format(**doc))

    def right(doc: Mapping[str, Any]) -> Any:
        value = doc[known.get("right", "right")]
        if known.get("right") == "choices":
            value = value[int(doc["gold"])]
        return [value] if known["check"] in ("text", "exact") and isinstance(value, str) else value

    def shown(doc: Mapping[str, Any]) -> str:
        return str(doc["shown"] if "shown" in doc else right(doc)[0])

    head = "".join(f"{worked(doc)} {shown(doc)}\n\n" for doc in held)
    items = tuple(
        Ask(
            id=f"{name}/{number}",
            number=_number(doc, number),
            chat=known["chat"].format(**doc) if "chat" in known else None,
            plain=head + worked(doc),
            right=None if known["check"] == "program" else right(doc),
            more=doc,
        )
        for number, doc in enumerate(docs)
    )
    return Asked(name, known["check"], known["tokens"], tuple(known["until"]), items)


def _number(doc: Mapping[str, Any], number: int) -> int:
    """MBPP is known by its task_id in every form of it, so that one decides its parity."""
    known = str(doc.get("task_id", ""))
    return int(known) if known.isdigit() else doc.get("number", number)


def _archive(member: str) -> list[dict[str, Any]]:
    if member.endswith(".arrow"):
        rows = assets.read_arrow(ARCHIVE, member)
        return [{**row, **row["answer"], "shown": row["answer"]["value"]} for row in rows]
    found: dict[int, dict[str, Any]] = {}
    for request in assets.read_jsonl(ARCHIVE, member):
        context = request["request"]["context"]
        number = request["doc_id"]
        found.setdefault(number, {**request["doc"], "context": context, "number": number})
    return list(found.values())


def _sums(_: str) -> list[dict[str, Any]]:
    rng, found = random.Random(0), []
    for number in range(SUMS):
        digits = 1 + number % 3
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        sign = "+-"[rng.randrange(2)]
        value = str(a + b if sign == "+" else a - b)
        found.append({"question": f"{a} {sign} {b}", "right": value, "shown": value})
    return found


def _small_programs(_: str) -> list[dict[str, Any]]:
    return [
        program_of(head, what, tests)
        for head, what, *tests in read_own("abilities/small_programs.yaml")
    ]


def _requests(_: str) -> list[dict[str, Any]]:
    found = []
    for family, one in read_own("abilities/chat.yaml").items():
        for fill in one["fill"]:
            expected = {key: value.format(*fill) if isinstance(value, str) else value
                        for key, value in one["expect"].items()}  # fmt: skip
            question = one["ask"].format(*fill)
            found.append({"question": question, "right": expected, "family": family})
    shown = [("Which animal gives us wool? Answer with one word.", "Sheep"),
             ("Name exactly two trees, separated by commas.", "Oak, birch"),
             ("Write one sentence about tea.", "Tea is a warm drink made of leaves.")]  # fmt: skip
    return [*found, *({"question": q, "right": {}, "shown": a} for q, a in shown)]


_MADE: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "sums": _sums, "small_programs": _small_programs, "requests": _requests,
}  # fmt: skip


def prompts(task: Asked, items: Sequence[Ask], tokenizer: Any, *, chat: bool) -> list[Prompt]:
    """Return what a model is asked: in its chat template, or by worked examples."""
    found = []
    for item in items:
        made = in_chat(tokenizer, item.chat) if chat and item.chat is not None else None
        if made is not None:
            ids = tokenizer(made, add_special_tokens=False)["input_ids"]
            found.append(Prompt(ids, task.tokens))
        else:
            found.append(Prompt(tokenizer(item.plain)["input_ids"], task.tokens, task.until))
    return found


def verdict(task: Asked, item: Ask, answer: Answer) -> bool:
    """Tell whether an answer is right. One that is empty or did not end by itself is wrong; a
    program runs in the sandbox."""
    if not answer.ended or not answer.text.strip():
        return False
    if task.check == "program":
        return not failure(_tested(item, answer.text))
    return bool(_CHECKS[task.check](answer.text, item.right))


_CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "text": checks.exact_match, "exact": checks.same_text, "number": checks.same_number,
    "result": checks.same_result, "request": checks.as_requested,
}  # fmt: skip


def _tested(item: Ask, text: str) -> str:
    doc = item.more
    entry = doc.get("entry_point") or checks.entry_of(doc["test_list"][0])
    code = checks.program(text, doc.get("prompt", ""), entry)
    if "test" in doc:
        return f"{code}\n{doc['test']}\ncheck({entry})\n"
    tests = doc["test_list"] if "test_list" in doc else [f"assert {one}" for one in doc["tests"]]
    return "\n".join([code, doc.get("test_setup_code", ""), *tests])
