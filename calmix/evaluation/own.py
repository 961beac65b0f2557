"""Tasks of the user's own: a .jsonl file whose rows are of one kind.

choices    {"question": ..., "choices": [..., ...], "answer": the place of the right one, from 0}
answers    {"question": ..., "answer": "..." or a list of right ones}
numbers    {"question": ..., "answer": 42}
programs   {"head": "double(x)", "question": "returns x times two.", "tests": ["double(4) == 8"]}
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calmix.errors import InputError
from calmix.files import sha256_file

NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"  # of a suite
KINDS = ("choices", "answers", "numbers", "programs")
LARGEST = 1e15  # below it a float tells every whole number
METRICS = {"choices": "acc_norm", "answers": "as_asked", "numbers": "as_asked",
           "programs": "pass@1"}  # fmt: skip
TOKENS = {"answers": 32, "numbers": 256, "programs": 320}
ENDS = {"answers": ("\n",), "numbers": ("\n\n", "\nQuestion")}
CHECKS = {"answers": "text", "numbers": "number", "programs": "program"}
# Rows of each kind for `calmix evaluate suite --new`.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"question": "Which of these is a fruit?", "choices": ["a stone", "an apple"], "answer": 1},
        {"question": "What do bees make?", "choices": ["honey", "milk", "silk"], "answer": 0},
    ],
    "answers": [
        {"question": "What is the capital of France? Answer with one word.", "answer": "Paris"},
        {"question": "What is the opposite of up? Answer with one word.",
         "answer": ["down", "downwards"]},
    ],
    "numbers": [
        {"question": "A shop sells pens in packs of 6. How many pens are in 7 packs?",
         "answer": 42},
        {"question": "What is 120 minus 45?", "answer": 75},
    ],
    "programs": [
        {"head": "double(x)", "question": "returns x times two.",
         "tests": ["double(4) == 8", "double(0) == 0"]},
        {"head": "is_even(n)", "question": "returns True if n is even, else False.",
         "tests": ["is_even(4)", "not is_even(7)"]},
    ],
}  # fmt: skip


def read_rows(path: str, kind: str, shots: int = 0) -> list[dict[str, Any]]:
    """Return the checked rows of a file; an InputError names the first line that is not right."""
    rows = _rows(path, kind, content_hash(path))
    if len(rows) <= shots:
        raise InputError(f"{path} has {len(rows)} rows, all of them worked examples: add rows, or "
                         f"lower 'shots', which is {shots}")  # fmt: skip
    return rows


def content_hash(path: str) -> str:
    """Return the SHA-256 of a file of items."""
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}, which a task of the suite names")
    return sha256_file(Path(path))


@functools.lru_cache(maxsize=32)
def _rows(path: str, kind: str, _: str) -> list[dict[str, Any]]:
    found = []
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{path}, line {number}: it is no JSON") from None
        wrong = "it is no JSON object" if not isinstance(row, dict) else _MISTAKES[kind](row)
        if not wrong and not _text(row.get("question")):
            wrong = "'question' must be a text"
        if wrong:
            raise InputError(f"{path}, line {number}: {wrong} (a row of kind {kind} is such as "
                             f"{json.dumps(EXAMPLES[kind][0])})")  # fmt: skip
        found.append(row)
    if not found:
        raise InputError(f"{path} holds no rows")
    return found


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_text, value))


def _choice(row: dict[str, Any]) -> str:
    choices, answer = row.get("choices"), row.get("answer")
    if not _texts(choices) or len(set(choices or [])) < 2:
        return "'choices' must be two texts or more"
    if type(answer) is not int or not 0 <= answer < len(choices or []):
        return "'answer' must be the place of the right choice, from 0"
    return ""


def _answer(row: dict[str, Any]) -> str:
    given = row.get("answer")
    return "" if _text(given) or _texts(given) else "'answer' must be a text, or a list of texts"


def _number(row: dict[str, Any]) -> str:
    given = row.get("answer")
    number = type(given) in (int, float) and abs(given or 0) < LARGEST
    return "" if number else f"'answer' must be a number below {LARGEST:g}"


def _program(row: dict[str, Any]) -> str:
    head, tests = row.get("head"), row.get("tests")
    if not _text(head) or not _parses(f"def {str(head).strip()}: pass", "exec"):
        return "'head' must be a function's, such as double(x)"
    if not _texts(tests) or not all(_parses(one.strip(), "eval") for one in tests or []):
        return "'tests' must be a list of expressions"
    return ""


def _parses(code: str, mode: str) -> bool:
    try:
        return bool(ast.parse(code, mode=mode))
    except (SyntaxError, ValueError):
        return False


_MISTAKES: dict[str, Callable[[dict[str, Any]], str]] = {
    "choices": _choice, "answers": _answer, "numbers": _number, "programs": _program,
}  # fmt: skip


def asked_of(path: str, kind: str, shots: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return how a file's questions are asked, as `abilities/tasks.yaml` has it (of programs what
    is not the same of all), and its rows."""
    known = {"check": CHECKS[kind], "tokens": TOKENS[kind], "examples": shots}
    rows = read_rows(path, kind, shots)
    if kind == "programs":
        return known, [program_of(row["head"].strip(), row["question"], row["tests"])
                       for row in rows]  # fmt: skip
    known |= {"until": ENDS[kind], "chat": "{question}", "plain": "Question: {question}\nAnswer:"}
    docs = []
    for row in rows:
        right = row["answer"]
        docs.append({
            "question": row["question"], "right": str(right) if kind == "numbers" else right,
            "shown": right[0] if isinstance(right, list) else str(right),
        })  # fmt: skip
    return known, docs


def program_of(head: str, question: str, tests: list[str]) -> dict[str, Any]:
    """Return a function that is asked for, and what has to hold of it."""
    return {"head": head, "question": question, "tests": tests, "prompt": f"def {head}:\n",
            "entry_point": head.partition("(")[0].strip()}  # fmt: skip


def template(name: str) -> dict[str, str]:
    """Return the files of a suite to start from: its YAML, and a file of rows a kind."""
    if not re.match(NAME, name):
        raise InputError(f"'{name}' is no name of a suite: use letters, digits, '.', '_', '+', '-'")
    rows = {kind: "".join(json.dumps(one) + "\n" for one in EXAMPLES[kind]) for kind in KINDS}
    tasks = "".join(f"    my_{kind}: {{file: {name}-{kind}.jsonl, kind: {kind}}}\n"
                    for kind in KINDS if kind != "programs")  # fmt: skip
    suite = (
        f"# calmix evaluate suite {name}.yaml checks this file; rows are in the .jsonl beside it.\n"
        f"name: {name}\nversion: 1\ndescription: tasks of our own\ndimensions:\n"
        f"  support:  # an ability: any name\n{tasks}"
        f"  code:\n    my_programs: {{file: {name}-programs.jsonl, kind: programs}}\n"
    )
    return {f"{name}.yaml": suite} | {f"{name}-{kind}.jsonl": text for kind, text in rows.items()}
