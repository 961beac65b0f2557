"""Checks: is what a model wrote right? Pure functions of the answer and of what is expected of it.

An answer that is empty or was cut is never right.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

LANGUAGES = {  # words that a text of one has and the others have not
    "en": "the a an is are and of to in it on with that was has this for",
    "fr": "le la les un une est et de des du dans sur il elle qui avec pour au c'est ciel",
    "es": "el la los las un una es y de del en que con por su al está cielo se",
    "de": "der die das ein eine einen ist und von im in auf mit den dem hat sich himmel",
}
CODE = re.compile(r"```(?:[a-zA-Z0-9+]*)\s*\n(.*?)(?:```|\Z)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def short_text(text: str) -> str:
    """Return a short answer as it is compared: SQuAD's normalisation (arXiv 1606.05250)."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def first_line(text: str) -> str:
    """Return the first line of an answer, without a label before it."""
    line = next((line for line in text.strip().splitlines() if line.strip()), "")
    return re.sub(r"^\W*(final )?answer\W*:\W*", "", line.strip(), flags=re.IGNORECASE)


def exact_match(answer: str, right: Sequence[str]) -> bool:
    """Tell whether the first line of an answer is one of the right ones."""
    return short_text(first_line(answer)) in {short_text(one) for one in right}


def word_f1(answer: str, right: Sequence[str]) -> float:
    """Return the best F1 over words of an answer's first line with any of the right ones."""
    given = Counter(short_text(first_line(answer)).split())
    best = 0.0
    for one in right:
        wanted = Counter(short_text(one).split())
        same = (given & wanted).total()
        best = max(best, 2 * same / max(1, given.total() + wanted.total()))
    return best


def last_number(answer: str) -> float | None:
    """Return the last number an answer has."""
    found = NUMBER.findall(answer)
    return float(found[-1].replace(",", "")) if found else None


def same_number(answer: str, right: str) -> bool:
    """Tell whether the last number of an answer is the right one."""
    return last_number(answer) == float(right.replace(",", ""))


def same_result(answer: str, right: str) -> bool:
    """Tell whether an answer's last boxed result, or else its last formula, is the right one
    (normalised as by Hendrycks et al., arXiv 2103.03874)."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

    boxed = last_boxed_only_string(answer)
    if boxed is not None and boxed.startswith("\\boxed{"):
        given = remove_boxed(boxed)
    else:
        stated = re.search(r"final answer is:?\s*\$?(.*?)\$?\.?(?: I hope|$)", answer, re.DOTALL)
        formulas = re.findall(r"\$([^$]+)\$", answer)
        found = last_number(answer)
        given = (stated[1] if stated else formulas[-1] if formulas
                 else "" if found is None else f"{found:g}")  # fmt: skip
    return bool(is_equiv(given.strip(), right))


def program(answer: str, head: str, entry: str) -> str:
    """Return the program of an answer: its code, with the function's head where that is missing."""
    blocks = CODE.findall(answer)
    code = next((block for block in blocks if f"def {entry}" in block), None)
    if code is None:
        code = blocks[0] if blocks else answer
    if f"def {entry}" not in code:
        return head + code
    imports = [line for line in head.splitlines() if line.startswith(("import ", "from "))]
    return "\n".join([*imports, code])


def as_requested(answer: str, expected: Mapping[str, Any]) -> bool:
    """Tell whether an answer to a plain request is as its family in chat.yaml says."""
    text = answer.strip()
    return bool(text) and all(_REQUESTED[key](text, value) for key, value in expected.items())


def _plain(text: str) -> str:
    return text.strip().strip("\"'`*_ \n").rstrip(".!").strip()


def _is(text: str, value: str) -> bool:
    return _plain(text).lower() in value.lower().split("|")


def _same(text: str, value: str) -> bool:
    return re.sub(r"\s+", " ", _plain(text)).lower() == _plain(value).lower()


def _items(text: str, comma: bool = False) -> list[str]:
    parts = text.split(",") if comma else text.splitlines()
    return [part for part in (re.sub(r"^\s*(?:[-*•]|\d+[.)])?\s*", "", one) for one in parts)
            if part]  # fmt: skip


def _json(text: str, value: str) -> bool:
    blocks = CODE.findall(text)
    try:
        return bool(json.loads(blocks[0] if blocks else text) == json.loads(value))
    except ValueError:
        return False


def _any(text: str, value: str) -> bool:
    return any(one.lower() in text.lower() for one in value.split("|"))


def _language(text: str, value: str) -> bool:
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
    counts = {name: sum(word in known.split() for word in words)
              for name, known in LANGUAGES.items()}  # fmt: skip
    return counts[value] > 0 and counts[value] == max(counts.values())


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|$)", text)) or 1


_REQUESTED = {
    "words": lambda text, value: len(_plain(text).split()) == int(value),
    "is": _is,
    "same": _same,
    "case": lambda text, value: _plain(text) == _plain(text).upper(),
    "lines": lambda text, value: len(_items(text)) == int(value),
    "commas": lambda text, value: len(_items(text, comma=True)) == int(value),
    "each_words": lambda text, value: all(
        len(part.split()) <= int(value) for line in _items(text) for part in line.split(",")
    ),
    "json": _json,
    "contains": _any,
    "without": lambda text, value: not _any(text, value),
    "begins": lambda text, value: text.lower().lstrip("\"'").startswith(value.lower()),
    "most_words": lambda text, value: len(text.split()) <= int(value),
    "sentences": lambda text, value: _sentences(text) == int(value),
    "language": _language,
}


def entry_of(test: str) -> str:
    """Return the name of the function that an assertion calls."""
    found = re.search(r"(\w+)\s*\(", test.partition("assert")[2].lstrip(" ("))
    return found[1] if found else ""
