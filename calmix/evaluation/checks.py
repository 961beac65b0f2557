"""Checks of generated answers: pure functions of the answer and of what is expected.

Empty or truncated answers never get here (`evaluate.verdict`).
"""

from __future__ import annotations

import json
import re
import string
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

LANGUAGES = {  # common words that identify a language
    "en": "the a an is are and of to in it on with that was has this for",
    "fr": "le la les un une est et de des du dans sur il elle qui avec pour au c'est ciel",
    "es": "el la los las un una es y de del en que con por su al está cielo se",
    "de": "der die das ein eine einen ist und von im in auf mit den dem hat sich himmel",
}
CODE = re.compile(r"```[^\S\n]*[a-zA-Z0-9+]*\s*\n(.*?)(?:```|\Z)", re.DOTALL)
NUMBER = re.compile(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)-?\.\d+")


def short_text(text: str) -> str:
    """Normalise a short answer for comparison, as SQuAD does (arXiv 1606.05250), but keep an
    answer that is only an article or punctuation, such as the choice "A"."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation).strip()
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split()) or kept or text.strip()


def first_line(text: str) -> str:
    """Return the first line of an answer, without a leading `Answer:`."""
    line = next((line for line in text.strip().splitlines() if line.strip()), "")
    return re.sub(r"^\W*(final )?answer\W*:\W*", "", line.strip(), flags=re.IGNORECASE)


def exact_match(answer: str, right: Sequence[str]) -> bool:
    """Whether the first line of an answer is a right one after normalisation."""
    given = short_text(first_line(answer))
    return bool(given) and given in {short_text(one) for one in right}


def own_match(answer: str, right: Sequence[str]) -> bool:
    """`exact_match` in any script: whatever the punctuation and the form of its characters."""
    given, *known = (
        "".join(char for char in unicodedata.normalize("NFKC", text)
                if char.isascii() or unicodedata.category(char)[0] != "P")
        for text in (answer, *right)
    )  # fmt: skip
    return exact_match(given, known)


def same_text(answer: str, right: Sequence[str]) -> bool:
    """Whether the first line of an answer is exactly a right one, up to quotation marks."""
    given = first_line(answer).strip("'\"` ").replace('"', "'")
    return given in {one.strip("'\"` ").replace('"', "'") for one in right}


def same_number(answer: str, right: str) -> bool:
    """Whether the last number of an answer is the right one."""
    found = NUMBER.findall(answer.replace("\N{MINUS SIGN}", "-"))
    return bool(found) and float(found[-1].replace(",", "")) == float(right.replace(",", ""))


def same_result(answer: str, solution: str) -> bool:
    """Whether an answer has the same result as a solution: its last `\\boxed`, or else its last
    formula or number."""
    given, wanted = (
        re.sub(r"\\(?:text|mathrm|mbox)\{([^}]*)\}|\\[!,;]|\\(?:left|right)\b", r"\1", one).strip()
        for one in (_result(answer), _result(solution))
    )
    return same_formula(given, wanted)


def _result(text: str) -> str:
    _, boxed, rest = text.rpartition("\\boxed")
    if boxed and rest.startswith("{") and "\\boxed " not in text:
        depth = 0
        for at, char in enumerate(rest):
            depth += (char == "{") - (char == "}")
            if not depth:
                return rest[1:at]
    formulas = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", text)
    if formulas:
        return next(filter(None, formulas[-1]))
    return str(["", *NUMBER.findall(text)][-1]).replace(",", "")


def same_formula(given: str, wanted: str) -> bool:
    """Whether two formulas have the same normal form; if there is none, whether they are equal."""
    try:
        return bool(given) and _normal(given) == _normal(wanted)
    except (ValueError, IndexError):
        return given == wanted


def _normal(text: str) -> str:
    """Return the normal form of Hendrycks et al. (arXiv 2103.03874), as implemented in
    lm-evaluation-harness."""
    for piece, other in (
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
        ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
    ):  # fmt: skip
        text = text.replace(piece, other)
    if "\\text{ " in text:  # a unit
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    head, equals, tail = text.partition("=")
    if equals and len(head) <= 2 and "=" not in tail:  # x = 5
        text = tail
    first, *roots = text.split("\\sqrt")
    text = first + "".join(f"\\sqrt{_braced(one)}" for one in roots)
    first, *fractions = text.replace(" ", "").split("\\frac")
    text = "\\frac".join([first, *fractions])
    if all(one[0] == "{" or len(one) > 1 for one in fractions):
        parts = [one if one[0] == "{" else _braced(one[0]) + _braced(one[1:]) for one in fractions]
        text = "\\frac".join([first, *parts])
    text = "\\frac{1}{2}" if text == "0.5" else text
    if text.count("/") == 1:
        over, under = map(int, text.split("/"))
        text = f"\\frac{{{over}}}{{{under}}}" if text == f"{over}/{under}" else text
    return text


def _braced(text: str) -> str:
    """Put braces around the first character, unless it is a brace."""
    return text if text[0] == "{" else f"{{{text[0]}}}{text[1:]}"


def program(answer: str, head: str, entry: str) -> str:
    """Extract the code of an answer; add the head of the function if it is missing."""
    blocks, defined = CODE.findall(answer), re.compile(rf"^def {re.escape(entry)}\b", re.MULTILINE)
    whole = [*blocks, *map(textwrap.dedent, blocks)]
    code = next(filter(defined.search, whole), (blocks or [answer])[0])
    if not defined.search(code):
        return head + code
    before = defined.split(head)[0] if defined.search(head) else ""
    return before + code


def as_requested(answer: str, expected: Mapping[str, Any]) -> bool:
    """Whether an answer meets every expectation of its request in chat.yaml."""
    text = answer.strip()
    words = re.findall(r"\w+", text.lower())
    looping = len(words) > 4 and max(Counter(words).values()) > len(words) / 2
    return not looping and all(_REQUESTED[key](text, value) for key, value in expected.items())


def _plain(text: str) -> str:
    return text.strip("\"'`*_.! \n")


def _same(text: str, value: str) -> bool:
    given, wanted = (re.sub(r"\s+|(?<=,)(?=\S)", " ", _plain(one)) for one in (text, value))
    return given.lower() == wanted.lower()


def _items(text: str, comma: bool = False) -> list[str]:
    parts = re.split(r",| and ", text) if comma else text.splitlines()
    named = [
        re.sub(r"^\s*(?:[-*•]|\d+[.)]|and )?\s*", "", one).strip(" .*").lower() for one in parts
    ]
    return list(dict.fromkeys(filter(None, named)))  # without duplicates


def _json(text: str, value: str) -> bool:
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        given, wanted = (json.dumps(json.loads(one), sort_keys=True).lower()
                         for one in (found[0] if found else "", value))  # fmt: skip
    except (ValueError, RecursionError):
        return False
    return given == wanted


def _any(text: str, value: str) -> bool:
    return any(re.search(rf"\b{re.escape(one.lower())}", text.lower()) for one in value.split("|"))


def _language(text: str, value: str) -> bool:
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
    counts = {name: sum(word in known.split() for word in words)
              for name, known in LANGUAGES.items()}  # fmt: skip
    return counts[value] > 0 and counts[value] == max(counts.values())


def _sentences(text: str) -> int:
    short = re.sub(r"\b(?:[a-z]\.){2,}", "", text)  # p.m.
    return len([part for part in re.split(r"[.!?]+(?:\s+|$)", short) if part.strip()])


_REQUESTED = {
    "words": lambda text, value: len(_plain(text).split()) == int(value),
    "is": lambda text, value: _plain(text).lower() in value.lower().split("|"),
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
