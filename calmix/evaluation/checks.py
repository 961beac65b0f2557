"""Checks of generated answers: pure functions of the answer and of what is expected.

An answer ends at its own mark, and what follows does not count: a program at the fence that closes
its code block, a string at its closing quotation mark, a short answer after its first sentence, a
number after the first sentence with "answer is". `judgeable_part` says what is judged of a cut one.
"""

from __future__ import annotations

import json
import re
import string
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

from calmix.evaluation.quantities import (
    GAP,
    MARKS,
    OPTIONAL,
    UNITS,
    plain_quantities,
    raised,
    readings,
    single,
    unit_of,
    without_unit,
)
from calmix.files import parse_json

VERSION = 6  # raised when verdicts change; part of the hash of suites with generated answers
LANGUAGES = {  # common words that identify a language
    "en": "the a an is are and of to in it on with that was has this for",
    "fr": "le la les un une est et de des du dans sur il elle qui avec pour au c'est ciel",
    "es": "el la los las un una es y de del en que con por su al está cielo se",
    "de": "der die das ein eine einen ist und von im in auf mit den dem hat sich himmel",
    "it": "il lo la gli le un una è di del della che in con per su al sono non si ha cielo",
    "pt": "o os as um uma é de do da dos que em com por para no na ao se não são está céu",
}
FENCE = "```"
SENTENCE_WORDS = 200  # words of a sentence that may name an answer
FORMULA_LENGTH = 1000  # characters; longer ones are compared as they are
CODE_BLOCK = re.compile(r"```[^\S\n]*[a-zA-Z0-9+]*\s*\n(.*?)(?:```|`{0,2}\Z)", re.DOTALL)
ANSWER_IS = re.compile(
    r"\banswer\s+is\b(?!\s+not\b)\s*:?\s*((?:[^.\n]|\.(?=\d))+)(\.|\n|\Z)", re.IGNORECASE
)
# The unit at the end of a formula: in \\text any word, otherwise one that is known and no variable.
UNIT_END = re.compile(
    r"(?<=[\w)}\]])(?:\s|\\[,;:! ]|~)*(?:\\(?:text|mathrm|mbox|textbf|textrm)\s*\{[\s~]*"
    r"([a-zA-Z][^{}]*)\}\s*(\^\s*\{?-?\d\}?)?"
    rf"|(?<![a-zA-Z])((?![a-zA-Z](?![\w.]))(?:{'|'.join(UNITS.values())}|\^\{{\\circ\}})))\Z"
)
FORMS = [  # of formulas that are equal
    (re.compile(pattern), other)
    for pattern, other in (
        (r"\\(?:text|mathrm|mbox|textbf|textrm)\s*\{([^}]*)\}", r"\1"),
        (r"\\[!,;:]|\\(?:left|right|displaystyle)\b|\\ |~", ""),
        (r"\A\(([A-Za-z])\)\Z", r"\1"),
        ("\u03c0", r"\\pi "),
        (r"([\^_])\s*\{(\w)\}", r"\1\2"),
        (r"\^(-?\d{2,}|-\d)", r"^{\1}"),
        (r"\s*(?:\\cdot(?![a-z])|\*)\s*(?=[a-zA-Z(]|\\(?![dt]?frac))", ""),
    )
]
# The end of a sentence: not after an initial or a short title ("W. W.", "Dr.").
STOP = re.compile(r"(?:(?<=[^\W\d_A-Z]{2})|(?<=[A-Z]{2})|(?<=[\d)\]'\"`]))[.!?](?=\s|\Z)")
FORMULA = re.compile(  # in text; "$5 and $6" are amounts
    r"(?<!\\)\$(?=\S)([^$]*[^\s$])\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
QUOTES = "'\"`"
QUOTED = re.compile(r"(?<!\w)(['\"`])(.+?)\1(?!\w)")
SIGNS = (
    r"(?<=\w)[+#]+|(?<=\w)\^(?=[{\w])|(?<=\d)[.,:/-](?=\d)|"
    r"(?<![\w.])(?:-\$?\.?|\.)(?=\d)|(?<=\b\w)-(?!\w)"
)
PUNCTUATION = re.compile(rf"({SIGNS})|[{re.escape(string.punctuation)}]")
# Beside a right phrase: words that may stand there, words that introduce it, and words that deny it
# or make it one of several guesses.
FILLERS, NAMING, DOUBT = (
    {*words.split()}
    for words in (
        "a an the this that these it its his her their of in on at by from with "
        "company inc ltd plc",
        "is are was were be being called known named termed as",
        "or either neither nor not no never but except unlike without than cannot isnt arent wasnt "
        "werent doesnt dont didnt cant",
    )
)


def judgeable_part(answer: str, check: str) -> str:
    """Return the part of a cut answer that may be judged, or "".

    An answer that reached the token limit or ran into a loop counts only up to its own mark: the
    last fence after a program, the closing quotation mark of a string, the end of the first
    sentence of a short answer or of the first one with "answer is", the last complete box. Without
    its mark it is wrong. Requests have rules for the whole reply, so a cut reply is wrong.
    """
    line, text = first_answer_line(answer), answer.strip()
    if check == "program":
        return "".join(answer.rpartition(FENCE)[:2])
    if check in ("number", "result"):
        boxes = [end for _, end in _boxes(answer) if check == "result"]
        stated = (one for one in ANSWER_IS.finditer(answer) if re.search(r"[\d\\$]", one[1]))
        ends = [one.end() for one in stated if one[2]]
        return answer[: boxes[-1] if boxes else min(ends, default=0)]
    if check in ("request", "tool") or not line:
        return ""
    mark = (check == "exact" and QUOTED.match(line)) or STOP.search(line)
    return line[: mark.end()] if mark else line if "\n" in text else ""


def short_text(text: str) -> str:
    """Normalise a short answer for comparison, as SQuAD does (arXiv 1606.05250), but keep signs and
    points ("-5", "1.5", "C++"), write quantities in one way (`plain_quantities`), and keep an
    article or punctuation that is the whole answer or its last word ("A", "vitamin A")."""
    known = plain_quantities(unicodedata.normalize("NFC", text).lower().strip())
    known = PUNCTUATION.sub(lambda sign: (sign[1] or "").replace("$", ""), known)
    return " ".join(re.sub(r"\b(a|an|the)\s+(?=\S)", " ", known).split()) or text.strip()


def first_answer_line(text: str) -> str:
    """Return the first line of an answer, without a leading `Answer:`."""
    line = next((line for line in text.strip().splitlines() if line.strip()), "").strip()
    return re.sub(r"^\W*(final )?answer\W{0,2}:[\s*_`]*", "", line, flags=re.IGNORECASE)


def sentences(line: str) -> list[str]:
    """Return a line, and what stands before the end of each of its sentences but the last."""
    return [line, *(line[: stop.start()] for stop in STOP.finditer(line))]


def short_match(answer: str, right: Sequence[str], question: str = "") -> bool:
    """Whether the first line or sentence of an answer is a right one after normalisation, or its
    first sentence names one (`named`). It may add a unit, unless the question names another."""
    line, words = first_answer_line(answer), short_text(question).split()
    units = {unit_of(word) for word in words if len(word) > 2} - {""} or {*UNITS}
    statements = {short_text(one) for one in sentences(line)} - {""}
    if _same(statements, right, {*units, *OPTIONAL}):
        return True
    first = min(sentences(line), key=len)
    return any(
        named(first, one, [*words, *(units if one[-1:].isdigit() else ())])
        for one in map(short_text, right)
    )


def _same(stated: set[str], right: Sequence[str], units: Collection[str] = OPTIONAL) -> bool:
    """Whether one of several normalised answers is a right one, or is but for a unit: one of
    `units` that it adds, or an optional one that it leaves out."""
    known = {short_text(one) for one in right}
    bare = {without_unit(one, OPTIONAL) for one in known}
    return not stated.isdisjoint(known | bare) or not known.isdisjoint(
        without_unit(one, units) for one in stated
    )


def named(sentence: str, phrase: str, terms: Sequence[str]) -> bool:
    """Whether a sentence gives a phrase as its answer to a question, whose words are `terms`.

    The phrase has to stand in whole words and not in the question. Between the last verb that names
    it ("is", "called") and the phrase, one word may stand that the question lacks ("water bottle");
    behind it none, unless a remark follows ("which ..."). A denial or an alternative in the
    sentence ("not", "or"), a list before the phrase, "to" and "number of" rule it out.
    """
    sentence = re.sub(r"\([^()]*\)", " ", sentence)
    words, wanted, free = short_text(sentence).split(), phrase.split(), {*terms} | FILLERS
    if len(words) > SENTENCE_WORDS:
        return False
    parts = (len(short_text(part).split()) for part in re.split(r"[,;](?!\d)", sentence))
    commas = {*accumulate(parts)}
    for start in range(len(words) - len(wanted) + 1):
        end = start + len(wanted)
        before, after = words[:start], words[end:]
        if words[start:end] != wanted or f" {phrase} " in f" {' '.join(terms)} ":
            continue
        lead = before[max((n + 1 for n, word in enumerate(before) if word in NAMING), default=0) :]
        tail = [] if after[:1] in (["which"], ["who"]) else after
        if (
            not DOUBT & {*before, *after}
            and before[-1:] != ["to"]
            and before[-2:] != ["number", "of"]
            and not commas & {*range(start - len(lead) + 1, start + 1)}
            and sum(word not in free for word in lead) <= 1
            and free.issuperset(tail)
        ):
            return True
    return False


def own_match(answer: str, right: Sequence[str]) -> bool:
    """Whether the first line of an answer is a right one after normalisation, in any script:
    whatever the punctuation and the form of its characters."""
    answer, *known = (
        "".join(
            char
            for char in unicodedata.normalize("NFKC", raised(text)).translate(MARKS)
            if char.isascii() or unicodedata.category(char)[0] != "P"
        )
        for text in (answer, *right)
    )
    stated = short_text(first_answer_line(answer))
    return bool(stated) and _same({stated}, known)


def same_text(answer: str, right: Sequence[str]) -> bool:
    """Whether the first line of an answer is exactly a right one, up to quotation marks and one
    full stop, or its first sentence or quotation is."""
    line = first_answer_line(answer).removeprefix("you ")
    known = {_listed(one.strip(QUOTES)) for one in right}
    if (quoted := QUOTED.search(line)) and not line.startswith("["):
        if _listed(quoted[2]) in known and not re.match(r"\W*or\b", line[quoted.end() :]):
            return True
        if not quoted.start():
            return False
    known = {one.strip() for one in known}
    begins = [part for one in sentences(line) for part in (one, one.removesuffix("."))]
    return not known.isdisjoint(_listed(one.strip(QUOTES)) for one in begins)


def _listed(text: str) -> str:
    """Write quotation marks and the spaces of a list in one way."""
    text = text.replace('"', "'")
    return re.sub(r",\s*", ", ", text) if text.startswith("[") else text


def same_number(answer: str, right: str) -> bool:
    """Whether the number of an answer is the right one: that of the first sentence with "answer
    is" (behind its last "=", if any), or else the last one."""
    stated = (readings(one[1].rpartition("=")[2])[:1] for one in ANSWER_IS.finditer(answer))
    numbers = next(filter(None, stated), None) or readings(answer)[-1:]
    return any(one.same(other) for one in numbers for other in readings(right)[:1])


def same_result(answer: str, solution: str) -> bool:
    """Whether an answer has the same result as a solution: its last `\\boxed`, or else what the
    first "answer is" states, or else its last formula or number. A unit may be added or left out,
    but not be another one."""
    (result, unit), (wanted, other) = (_cleaned(_result(text)) for text in (answer, solution))
    if unit and other and unit != other:
        return False
    if "=" not in wanted:
        result = result.rpartition("=")[2].strip()
    if same_formula(result, wanted):
        return True
    one, two = (
        single(f"{text}%" if of == "percent" else text)
        for text, of in ((result, unit), (wanted, other))
    )
    return one is not None and two is not None and one.same(two)


def _cleaned(text: str) -> tuple[str, str]:
    """Return a formula in a simple form, without its unit, and the unit, "" if it is not known."""
    if len(text) > FORMULA_LENGTH:
        return text, ""
    text, unit = raised(GAP.sub(",", text)).replace("**", "^").strip().removesuffix("."), ""
    if ends := UNIT_END.search(text):
        text = text[: ends.start()]
        unit = unit_of((ends[1] or ends[3]).strip())
        unit += re.sub(r"[\s{}]", "", ends[2] or "") if unit else ""
    elif sign := re.match(r"-?\\?([$\u20ac\u00a3\u00a5])", text):
        text, unit = text[: sign.start(1)].rstrip("\\") + text[sign.end() :], unit_of(sign[1])
    for pattern, other in FORMS:
        text = pattern.sub(other, text)
    text = text.strip()
    thousands = re.fullmatch(r"(-?\d{1,3}(?:,\d{3})+)((?:\.\d+)?)", text)
    return thousands[1].replace(",", "") + thousands[2] if thousands else text, unit


def _boxes(text: str) -> Iterator[tuple[str, int]]:
    """Yield what stands in each complete `\\boxed{...}` of a text, and where it ends."""
    for begin in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for at in range(begin.end(), len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if not depth:
                yield text[begin.end() : at], at + 1
                break


def _result(text: str) -> str:
    if boxes := [box for box, _ in _boxes(text)]:
        return boxes[-1]
    stated = ANSWER_IS.search(text)
    for part, which in ((stated[1] if stated else "", 0), (text, -1)):
        if formulas := [one[1] or one[2] or one[3] for one in FORMULA.finditer(part)]:
            return str(formulas[which])
        if numbers := readings(part):
            return numbers[which].text
    return ""


def same_formula(stated: str, wanted: str) -> bool:
    """Whether two formulas have the same normal form; if there is none, whether they are equal."""
    try:
        return bool(stated) and _normal(stated) == _normal(wanted)
    except (ValueError, IndexError):
        return stated == wanted


def _normal(text: str) -> str:
    """Return the normal form of Hendrycks et al. (arXiv 2103.03874), as implemented in
    lm-evaluation-harness."""
    for piece, other in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
    ):
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
    defined = re.compile(rf"^def {re.escape(entry)}\b", re.MULTILINE)
    before, blocks = answer.partition(FENCE)[0], CODE_BLOCK.findall(answer)
    unopened = rf"\s*(?:(?:import|from|#|@).*\n\s*)*def {re.escape(entry)}\b|\n*(?:  +|\t)\S"
    if not blocks or re.match(unopened, before):
        blocks = [before]
    whole = [*blocks, *map(textwrap.dedent, blocks)]
    code = next(filter(defined.search, whole), blocks[0])
    if not defined.search(code):
        return head + code
    begin = defined.split(head)[0] if defined.search(head) else ""
    return begin + code


def as_requested(answer: str, expected: Mapping[str, Any]) -> bool:
    """Whether an answer meets every expectation of its request in chat.yaml."""
    text = answer.strip()
    words = re.findall(r"\w+", text.lower())
    looping = len(words) > 4 and max(Counter(words).values()) > len(words) / 2
    if "language" in expected:  # an introduction may be in another language
        text = re.sub(r"\A[^\n:]*:\s*(?=[\n\"\u00ab\u201e])", "", text)
    return not looping and all(REQUESTED[key](text, value) for key, value in expected.items())


def _plain(text: str) -> str:
    return text.strip("\"'`*_.! \n")


def _is(text: str, value: str) -> bool:
    stated, *known = ((_plain(one) or one).lower() for one in (text, *value.split("|")))
    return stated in known


def _copied(text: str, value: str) -> bool:
    stated, wanted = (re.sub(r"\s+|(?<=,)(?=\S)", " ", _plain(one)) for one in (text, value))
    return stated.lower() == wanted.lower()


def _items(text: str, comma: bool = False) -> list[str]:
    parts = re.split(r",| and ", text) if comma else text.splitlines()
    named = [
        re.sub(r"^\s*(?:[-*•]|\d+[.)]|and )?\s*", "", one).strip(" .*").lower() for one in parts
    ]
    return list(dict.fromkeys(filter(None, named)))  # without duplicates


def json_value(text: str) -> Any:
    """Return the value of a JSON text; None if it is not valid."""
    with suppress(ValueError):
        return parse_json(text)


def _json(text: str, value: str) -> bool:
    match = re.search(r"\[.*\]" if value[:1] == "[" else r"\{.*\}", text, re.DOTALL)
    stated = json_value(match[0]) if match else None
    return stated is not None and same_json(stated, json.loads(value))


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same, texts and names without regard to case."""
    first, second = (json.dumps(value, sort_keys=True).lower() for value in (one, other))
    return first == second


def _any(text: str, value: str) -> bool:
    begin = r"(?:\b|(?!\w))"  # of a word, if the value begins with one
    known = map(re.escape, value.lower().split("|"))
    return any(re.search(begin + one, text.lower()) for one in known)


def _among(text: str, value: str) -> bool:
    lines = _items(text)
    named = lines if len(lines) > 1 else _items(text, comma=True)
    one = rf"(?:{value.replace('y|', '(?:y|ies)|')})(?:s|es)?"
    known = re.compile(rf"(?<!\w){one}(?!\w)", re.IGNORECASE)
    return 2 * sum(bool(known.search(one)) for one in named) > len(named)


def common_words(text: str) -> dict[str, int]:
    """Return how many words of a text are common ones of each language."""
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
    return {name: sum(word in known.split() for word in words) for name, known in LANGUAGES.items()}


def _language(text: str, value: str) -> bool:
    counts = common_words(text)
    return counts[value] > 0 and counts[value] == max(counts.values())


def _sentences(text: str) -> int:
    short = re.sub(r"\b(?:[a-z]\.){2,}|^\s*\d+[.)]\s", "", text, flags=re.MULTILINE)  # p.m., 1.
    return len({part.strip() for part in re.split(r"[.!?]+(?:\s+|$)", short)} - {""})


REQUESTED = {
    "words": lambda text, value: len(_plain(text).split()) == int(value),
    "is": _is,
    "same": _copied,
    "case": lambda text, value: _plain(text) == _plain(text).upper(),
    "lines": lambda text, value: len(_items(text)) == int(value),
    "commas": lambda text, value: len(_items(text, comma=True)) == int(value),
    "each_words": lambda text, value: all(
        len(part.split()) <= int(value) for line in _items(text) for part in line.split(",")
    ),
    "among": _among,
    "json": _json,
    "contains": _any,
    "without": lambda text, value: not _any(text, value),
    "begins": lambda text, value: text.lower().lstrip("\"'").startswith(value.lower()),
    "most_words": lambda text, value: len(text.split()) <= int(value),
    "sentences": lambda text, value: _sentences(text) == int(value),
    "language": _language,
}
COUNTED_RULES = (
    "words",
    "lines",
    "commas",
    "each_words",
    "most_words",
    "sentences",
)  # take numbers
