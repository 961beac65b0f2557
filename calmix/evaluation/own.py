"""Tasks of the user's own: a .jsonl file whose rows are of one kind.

choices    {"question": ..., "choices": [..., ...], "answer": the place of the right one, from 0}
answers    {"question": ..., "answer": "..." or a list of right ones}
numbers    {"question": ..., "answer": 42}
programs   {"head": "double(x)", "question": "returns x times two.", "tests": ["double(4) == 8"]}
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from calmix.errors import InputError
from calmix.yaml_files import read_text

NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"  # of a suite
LARGEST = 1e15  # below it a float tells every whole number
# How rows are asked, as `abilities/tasks.yaml` has it; of programs what is not the same of all.
QUESTION = {"chat": "{question}", "plain": "Question: {question}\nAnswer:"}
ASKED: dict[str, dict[str, Any]] = {
    "answers": QUESTION | {"check": "text", "tokens": 32, "until": ("\n",)},
    "numbers": QUESTION | {"check": "number", "tokens": 256, "until": ("\n\n", "\nQuestion")},
    "programs": {"check": "program", "tokens": 320},
}
# A row of each kind for `calmix evaluate suite --new`.
EXAMPLES: dict[str, dict[str, Any]] = {
    "choices": {"question": "Which is a fruit?", "choices": ["a stone", "an apple"], "answer": 1},
    "answers": {"question": "What is the opposite of up? Answer with one word.",
                "answer": ["down", "downwards"]},
    "numbers": {"question": "A shop sells pens in packs of 6. How many pens are in 7 packs?",
                "answer": 42},
    "programs": {"head": "double(x)", "question": "returns x times two.",
                 "tests": ["double(4) == 8", "double(0) == 0"]},
}  # fmt: skip


def read_rows(path: str, kind: str, shots: int = 0) -> list[dict[str, Any]]:
    """Return the checked rows of a file; an InputError names the first line that is not right."""
    found = []
    for number, line in enumerate(read_text(Path(path)).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            wrong = _mistake(row, kind) if isinstance(row, dict) else "it is no JSON object"
        except ValueError:
            wrong = "it is no JSON"
        if wrong:
            raise InputError(f"{path}, line {number}: {wrong} (a row of kind {kind} is such as "
                             f"{json.dumps(EXAMPLES[kind])})")  # fmt: skip
        found.append(row)
    if len(found) <= shots:
        raise InputError(f"{path} has {len(found)} rows, {shots} of them worked examples: add rows")
    return found


def _mistake(row: Any, kind: str) -> str:
    """Return what is wrong with a row; nothing if it is right."""
    choices, answer, head, tests = map(row.get, ("choices", "answer", "head", "tests"))
    several = _texts(choices) and len(set(choices)) > 1
    rules = {
        "choices": {
            "'choices' must be two texts or more": several,
            "'answer' must be the place of the right choice, from 0": several
            and type(answer) is int and 0 <= answer < len(choices),
        },
        "answers": {"'answer' must be a text, or a list of texts": _text(answer) or _texts(answer)},
        "numbers": {f"'answer' must be a number below {LARGEST:g}": type(answer) in (int, float)
                    and abs(answer) < LARGEST},
        "programs": {
            "'head' must be a function's, such as double(x)": _text(head)
            and _parses(f"def {head.strip()}: pass", "exec"),
            "'tests' must be a list of expressions": _texts(tests)
            and all(_parses(one.strip(), "eval") for one in tests),
        },
    }[kind] | {"'question' must be a text": _text(row.get("question"))}  # fmt: skip
    return next((rule for rule, kept in rules.items() if not kept), "")


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_text, value))


def _parses(code: str, mode: str) -> bool:
    try:
        return bool(ast.parse(code, mode=mode))
    except (SyntaxError, ValueError):
        return False


def asked_of(path: str, kind: str, shots: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return how a file's questions are asked, and its rows."""
    known, rows = ASKED[kind] | {"examples": shots}, read_rows(path, kind, shots)
    if kind == "programs":
        return known, [program_of(row["head"].strip(), row["question"], row["tests"])
                       for row in rows]  # fmt: skip
    found = []
    for row in rows:
        right = row["answer"] if kind == "answers" else str(row["answer"])
        shown = right if isinstance(right, str) else right[0]
        found.append({"question": row["question"], "right": right, "shown": shown})
    return known, found


def program_of(head: str, question: str, tests: list[str]) -> dict[str, Any]:
    """Return a function that is asked for, and what has to hold of it."""
    return {"head": head, "question": question, "tests": tests, "prompt": f"def {head}:\n",
            "entry_point": head.partition("(")[0].strip()}  # fmt: skip


def template(name: str) -> dict[str, str]:
    """Return the files of a suite to start from: its YAML, and a file of rows a kind."""
    if not re.match(NAME, name):
        raise InputError(f"'{name}' is no name of a suite: use letters, digits, '.', '_', '+', '-'")
    tasks = {kind: f"    my_{kind}: {{file: {name}-{kind}.jsonl, kind: {kind}}}\n"
             for kind in EXAMPLES}  # fmt: skip
    code = tasks.pop("programs")
    suite = (
        f"# calmix evaluate suite {name}.yaml checks this file; rows are in the .jsonl beside it.\n"
        f"name: {name}\nversion: 1\ndescription: tasks of our own\ndimensions:\n"
        f"  support:  # an ability: any name\n{''.join(tasks.values())}  code:\n{code}"
    )
    rows = {f"{name}-{kind}.jsonl": f"{json.dumps(row)}\n" for kind, row in EXAMPLES.items()}
    return {f"{name}.yaml": suite} | rows
