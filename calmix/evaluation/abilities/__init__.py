"""What a model is asked to do and a program can check: items, prompts and verdicts.

The questions of the archive's benchmarks, and requests, sums and tiny programs made here. A model
with a chat template is asked in it, others by worked examples.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix import assets
from calmix.evaluation import checks
from calmix.evaluation.greedy import Answer, answers, prompt
from calmix.evaluation.own import asked_of, program_of
from calmix.evaluation.sandbox import check_sandbox, failure
from calmix.evaluation.scorer import Scorer
from calmix.evaluation.suites import ARCHIVE, ASKED, TaskSpec
from calmix.evaluation.tasks import document_number
from calmix.machine import cores
from calmix.yaml_files import packaged

SUMS = 120
ANSWER = 24  # requests of likelihood that take about as long
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "text": checks.exact_match, "exact": checks.same_text, "number": checks.same_number,
    "result": checks.same_result, "request": checks.as_requested,
}  # fmt: skip


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


def ask(scorer: Scorer, asked: Sequence[tuple[str, Ask]]) -> list[tuple[float, str, int]]:
    """Return of each item, with the name of its task, whether a model's answer is right, the answer
    and whether it ended."""
    if any(one.check == "program" for _, one in asked):
        check_sandbox()
    prompts = [prompt(scorer.tokenizer, one.chat, one.plain, one.tokens, one.until)
               for _, one in asked]  # fmt: skip
    scorer.truncated.update(name for (name, _), one in zip(asked, prompts, strict=True)
                            if len(one.ids) + one.tokens > scorer.max_length)  # fmt: skip
    written = answers(scorer.opened, prompts, tick=lambda n: scorer.tick(n * ANSWER))
    with ThreadPoolExecutor(cores()) as pool:  # programs run in processes of their own
        good = pool.map(verdict, (item for _, item in asked), written)
    return [(float(value), one.text, int(one.ended))
            for value, one in zip(good, written, strict=True)]  # fmt: skip


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


def task_of(spec: TaskSpec) -> list[Ask]:
    """Return the items of a task that are scored."""
    if spec.file is None:
        items = load_asked(str(spec.asked))
    else:
        known, docs = asked_of(spec.file, str(spec.kind), spec.shots or 0)
        if spec.kind == "programs":  # asked as the small ones that come with the evaluation
            known = packaged(ASKED)["small_programs"] | known
        items = _asked(Path(spec.file).stem, known, docs)
    return spec.pick(items)


@functools.lru_cache(maxsize=32)
def load_asked(name: str) -> tuple[Ask, ...]:
    """Return all items of a task that comes with the evaluation."""
    known = packaged(ASKED)[name]
    return _asked(name, known, MADE.get(known["from"], _archive)(known["from"]))


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


def _archive(member: str) -> list[dict[str, Any]]:
    if member.endswith(".arrow"):
        rows = assets.read_arrow(ARCHIVE, member)
        return [{**row, **row["answer"], "shown": row["answer"]["value"]} for row in rows]
    found: dict[int, dict[str, Any]] = {}
    for one in assets.read_jsonl(ARCHIVE, member):
        more = {"context": one["request"]["context"], "number": one["doc_id"]}
        found.setdefault(one["doc_id"], one["doc"] | more)
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


def _requests(_: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for one in packaged("evaluation/abilities/chat.yaml").values():
        for fill in one["fill"]:
            expected = {key: value.format(*fill) if isinstance(value, str) else value
                        for key, value in one["expect"].items()}  # fmt: skip
            found.append({"question": one["ask"].format(*fill), "right": expected})
    shown = [("Which animal gives us wool? Answer with one word.", "Sheep"),
             ("Name exactly two trees, separated by commas.", "Oak, birch"),
             ("Write one sentence about tea.", "Tea is a warm drink made of leaves.")]  # fmt: skip
    return [*found, *({"question": q, "right": {}, "shown": a} for q, a in shown)]


MADE: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "sums": _sums, "requests": _requests,
    "small_programs": lambda _: [
        program_of(head, what, tests)
        for head, what, *tests in packaged("evaluation/abilities/small_programs.yaml")
    ],
}  # fmt: skip


def verdict(item: Ask, answer: Answer) -> bool:
    """Tell whether an answer is right. One that is empty or did not end by itself is wrong; a
    program runs in the sandbox."""
    if not answer.ended or not answer.text.strip():
        return False
    if item.check != "program":
        return CHECKS[item.check](answer.text, item.right)
    doc = item.doc
    entry = doc.get("entry_point") or checks.entry_of(doc["test_list"][0])
    code = checks.program(answer.text, doc.get("prompt", ""), entry)
    if "test" in doc:
        tests = [doc["test"], f"check({entry})"]
    else:
        tests = doc.get("test_list") or [f"assert {one}" for one in doc["tests"]]
        tests = [doc.get("test_setup_code", ""), *tests]
    return not failure("\n".join([code, *tests, ""]))
